"""``gradfilter runs``: list trainings, with their state and their last evaluation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gradfilter.lab._run_files import printable, reading
from gradfilter.lab._runs_config import RunsConfig
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._evaluation import read_evaluations
from gradfilter.lab.train._run_place import (
    METRICS,
    read_config,
    run_directories,
    without_record,
)
from gradfilter.lab.train._train_config import TrainConfig

# --- One line per training ---


DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(TrainConfig)}
LONGEST = 60
"""Largest number of characters of a recorded text; a foreign file may hold any."""
FILTERS = (
    *("agree", "consensus", "reference", "trimmed_mean", "coordinate_median"),
    *("geometric_median", "centered_clip", "clip_per_row", "clip_quantile", "clip_smallest"),
    *("normalize_rows", "outlier_filter", "trim_losses", "budget_clip"),
    *("agc", "spike_clip", "adagc", "spike_skip"),
    *("sam", "friendly_sam", "look_sam", "gsam", "ema", "msam"),
)
"""Settings that add a transform in addition to the update rule."""
WRAPPERS = ("schedule_free", "cautious")
"""Settings that change the update rule and have no number."""


@dataclass(frozen=True)
class ListedRun:
    """A training in the list.

    Attributes:
        directory: The run directory.
        state: running, interrupted, failed or finished, as the training last wrote.
        model: Name of the model.
        data: Name of the data set.
        rule: Transforms and update rule.
        epoch: Epochs done.
        epochs: Epochs of the whole training.
        step: Steps done.
        steps: Steps of the whole training; None if the record does not say.
        train_loss: Loss on the training set at the last evaluation; None without one.
        test_accuracy: Accuracy on the test set at the last evaluation; None without one.
        changed: Time at which the training last wrote, in ISO 8601.
    """

    directory: str
    state: str
    model: str
    data: str
    rule: str
    epoch: float
    epochs: float | None
    step: int
    steps: int | None
    train_loss: float | None
    test_accuracy: float | None
    changed: str


def list_runs(dirs: Sequence[Path]) -> tuple[list[ListedRun], list[str]]:
    """Read the trainings below some directories; also return a line about each other directory.

    Raises:
        UsageError: A directory does not exist.
    """
    listed, others = [], []
    for place in run_directories(dirs):
        try:
            record = read_config(place)
            if record.get("command") != "train":
                raise UsageError(f"{str(place)!r} is not a run of gradfilter train.")
            evaluations, _ = read_evaluations(place / METRICS)
            with reading(place / "config.json", "the record of a run", ""):
                listed.append(_listed(place, record, evaluations[-1] if evaluations else {}))
        except UsageError as error:
            others.append(str(error))
    return listed, others + without_record(dirs)


def _listed(place: Path, record: Mapping[str, Any], last: Mapping[str, Any]) -> ListedRun:
    settings = {**DEFAULTS, **record["settings"]}
    total = record.get("total_steps")
    return ListedRun(
        directory=str(place),
        state=_shortened(record.get("status")),
        model=_shortened(settings["model"]),
        data=_shortened(settings["data"]),
        rule=_shortened(rule_of(settings)),
        epoch=_finite(float(last.get("epoch") or 0)) or 0.0,
        epochs=None if settings["steps"] is not None else _finite(float(settings["epochs"])),
        step=last.get("step", 0),
        steps=total if isinstance(total, int) else settings["steps"],
        train_loss=_finite(last.get("train_loss")),
        test_accuracy=_finite(last.get("test_accuracy")),
        changed=_changed(place),
    )


def rule_of(settings: Mapping[str, Any]) -> str:
    """Return transforms and update rule of a training.

    Examples:
        >>> rule_of({**DEFAULTS, "agree": 0.97, "agc": 0.01, "nesterov": True})
        'agree 0.97, agc 0.01, sgd+nesterov 0.05'
        >>> rule_of({**DEFAULTS, "optimizer": "adamw", "cautious": True, "msam": 0.3})
        'msam 0.3, cautious adamw 0.05'
    """
    # 0 is a value: a filter that accepts nothing. Only AGC is off at 0.
    on = [n for n in FILTERS if settings[n] is not None and (settings[n] != 0 or n != "agc")]
    parts = [_shown_filter(name, settings[name]) for name in on if settings[name] is not False]
    wrappers = [n.replace("_", "-") for n in WRAPPERS if settings[n]]
    nesterov = "+nesterov" if settings["nesterov"] else ""
    rule = " ".join([*wrappers, f"{settings['optimizer']}{nesterov}"])
    return ", ".join([*parts, f"{rule} {settings['learning_rate']:g}"])


def _shown_filter(name: str, value: float | str | bool) -> str:
    """Return a filter with its value, for example ``agree 0.97``; a switch has none."""
    shown = name.replace("_", "-")
    if value is True:
        return shown
    return f"{shown} {value}" if isinstance(value, str) else f"{shown} {value:g}"


def _finite(value: float | None) -> float | None:
    """Return a number; None instead of NaN, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if 0 <= value <= 1 else f"{100 * value:.3g}"


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _changed(place: Path) -> str:
    """Return the last time at which a run wrote its record or its metrics."""
    files = [path for name in ("config.json", METRICS) if (path := place / name).exists()]
    newest = max(path.stat().st_mtime for path in files)
    return datetime.fromtimestamp(newest).astimezone().isoformat(timespec="seconds")


# --- The list ---


HEADINGS = ("directory", "state", "model", "data", "rule", "epoch", "loss", "test %", "changed")
RIGHT = {"epoch", "loss", "test %"}


def row_of(run: ListedRun) -> tuple[str, ...]:
    """Return the cells of a run, without control characters."""
    done = (
        f"{run.epoch:g}/{run.epochs:g}"
        if run.epochs is not None
        else f"step {run.step}/{'?' if run.steps is None else run.steps}"
    )
    cells = (
        *(run.directory, run.state, run.model, run.data, run.rule, _shortened(done)),
        "-" if run.train_loss is None else f"{run.train_loss:.4g}",
        "-" if run.test_accuracy is None else _percent(run.test_accuracy),
        run.changed[:16].replace("T", " "),
    )
    return tuple(map(printable, cells))


def drawn(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Return rows as columns, numbers to the right.

    Args:
        rows: The headings and the cells of every run, the directory first.
        width: Width of the terminal; None without one. Rows that are wider have the directory on a
            line of its own, above the other cells.
    """
    lines = _aligned(rows, HEADINGS)
    if width is not None:
        if max(map(len, lines)) > width:
            cells = _aligned([row[1:] for row in rows], HEADINGS[1:])
            pairs = zip((row[0] for row in rows), cells, strict=True)
            lines = [f"{directory}\n  {line}" for directory, line in pairs]
        lines.insert(1, "-" * width)
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if name in RIGHT else cell.ljust(width)
            for name, cell, width in zip(headings, row, widths, strict=True)
        )
        for row in rows
    )
    return [line.rstrip() for line in lines]


def runs(config: RunsConfig) -> int:
    """Run ``gradfilter runs``.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: A directory does not exist.
    """
    listed, others = list_runs(config.dirs)
    if config.json:
        errors = [{"error": printable(line)} for line in others]
        print(json.dumps([*map(asdict, listed), *errors], indent=2, allow_nan=False))
        return 0
    if listed:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(drawn([HEADINGS, *map(row_of, listed)], width))
    else:
        print(f"no trainings in {', '.join(printable(folder) for folder in config.dirs)}")
    for line in others:
        print(printable(f"not listed: {line}"))
    return 0
