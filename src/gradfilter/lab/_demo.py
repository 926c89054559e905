"""``gradfilter demo``: run three trainings on digits with wrong labels, and print a table."""

from __future__ import annotations

import math
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import gradfilter as gf
from gradfilter.distributed._ranks import Ranks
from gradfilter.lab._connect import connected
from gradfilter.lab._demo_config import (
    MICROBATCHES,
    DemoConfig,
    check_values,
    directory,
    evaluate_every,
)
from gradfilter.lab._device import own_device, usable_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._options import arguments, parse, read_settings
from gradfilter.lab._plot import Measured, as_metrics_line, curves
from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import append_json_line, printable, write_bytes, write_json
from gradfilter.lab.train._archive import tensor_bytes
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._progress import bars
from gradfilter.lab.train._run_place import plain_settings
from gradfilter.lab.train._train_config import TrainConfig
from gradfilter.lab.train._training import Training, advance, evaluation, no_totals, sync_ranks

# --- The table: one line per method, mean ± sd over seeds ---


# Heading, and the field of the last evaluation to show; fractions become per cent.
COLUMNS = {
    "final\ntest %": "test_accuracy",
    "best test %\n(oracle)": "best",
    "clean\ntrain %": "train_clean_accuracy",
    "memorised\n%": "memorised",
    "accepted\nrows %": "accepted",
    "skipped\nsteps": "skipped",
    "seconds": "seconds",
}
COUNTS = {"skipped", "seconds"}

CAPTION = (
    "final test: the result. best test: the highest of all evaluations, picked with the test "
    "labels, so an upper bound and no result. clean train: training images with true labels. "
    "memorised: wrong labels that the model predicts. seconds: training steps alone."
)


def comparison(measured: Sequence[Measured], labels: Mapping[str, str]) -> Table:
    """Build a table with a line per method, from the last evaluations of all seeds and the best.

    Args:
        measured: The evaluations to show, in the order they were made.
        labels: Description of every method, by its name in the other files.
    """
    legend = " ".join(f"{name}: {label}." for name, label in labels.items())
    table = Table(
        caption=f"{legend} {CAPTION}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run", no_wrap=True)
    for heading in COLUMNS:
        width = max(len(line) for line in heading.splitlines())
        table.add_column(heading, justify="right", min_width=width)
    for name in labels:
        by_seed: dict[int, list[Evaluation]] = {}
        for one in measured:
            if one.run == name:
                by_seed.setdefault(one.seed, []).append(one.evaluation)
        best = [max(e.test_accuracy for e in of_seed) for of_seed in by_seed.values()]
        # Evaluations have equal distances, so that their mean is that of all steps.
        accepted = [_mean([e.accepted for e in of_seed]) for of_seed in by_seed.values()]
        last = [of_seed[-1] for of_seed in by_seed.values()]
        found = {"best": best, "accepted": accepted}
        cells = [
            _spread(found.get(key) or [getattr(e, key) for e in last], 1 if key in COUNTS else 100)
            for key in COLUMNS.values()
        ]
        table.add_row(name, *cells)
    return table


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return statistics.mean(measured) if measured else math.nan


def _spread(values: Sequence[float], factor: float) -> str:
    """Return ``mean ± sd`` of the finite values; the sample deviation needs two values."""
    measured = [factor * v for v in values if not math.isnan(v)]
    if not measured:
        return "-"
    if len(measured) == 1:
        return f"{measured[0]}" if isinstance(measured[0], int) else f"{measured[0]:.1f}"
    return f"{statistics.mean(measured):.1f} ± {statistics.stdev(measured):.1f}"


# --- The three trainings: presets of ``gradfilter train`` ---


@dataclass(frozen=True)
class Method:
    """A method that reduces the rows of a batch to one gradient.

    Attributes:
        name: Short name for files and metrics; the preset is demo-NAME.
        label: Label for people.
    """

    name: str
    label: str


METHODS = (
    Method("sgd", "plain SGD"),
    Method("agree", f"agreement of {MICROBATCHES} microbatches"),
    Method("consensus", "consensus of per-sample gradients"),
)
LABELS = {method.name: method.label for method in METHODS}


def train_config(method: Method, config: DemoConfig, seed: int) -> TrainConfig:
    """Return the settings of a training, equal to ``gradfilter train --preset demo-NAME``."""
    settings = read_settings(f"demo-{method.name}", None, "train")
    preset = parse(TrainConfig, "gradfilter demo", arguments(settings))
    return replace(
        preset,
        agree=None if preset.agree is None else config.threshold,
        label_noise=config.noise,
        steps=config.steps,
        seed=seed,
        data_split_seed=seed,
        label_seed=seed,
        device=config.device,
        dtype=config.dtype,
        workers=0,
    )


def settings(config: DemoConfig) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    return {
        "command": "demo",
        **asdict(config),
        "out": None if config.out is None else str(config.out),
        "runs": {
            method.name: plain_settings(train_config(method, config, config.seed))
            for method in METHODS
        },
        "evaluate_every": evaluate_every(config.steps),
        "threads": torch.get_num_threads(),
        "processes": started_processes(),
        "versions": {
            "gradfilter": gf.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


# --- The command ---


def demo(config: DemoConfig) -> int:
    """Run ``gradfilter demo``.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is out of range. No file has been changed then.
    """
    check_values(config)
    device = own_device(usable_device(config.device))
    with connected(device) as ranks, interruptible() as stop:
        train = partial(_train_all, config, device, ranks, ranks.on_any(stop))
        if ranks.is_first:
            return 0 if _recorded(config, train) else stop.exit_code
        # The other ranks only compute; messages are printed once.
        finished = _finished_seeds(config, train(None))
        return 0 if len(finished) == config.seeds else stop.exit_code


def _recorded(config: DemoConfig, train: Callable[[Path], list[Measured]]) -> bool:
    """Train, write and print the results; return whether all trainings were finished."""
    folder = directory(config)
    record, status = settings(config), "interrupted"
    write_json(folder / "config.json", {**record, "status": "running"})
    print(f"writing to {printable(folder)}", flush=True)
    try:
        if _report(config, folder, train(folder)):
            status = "finished"
    finally:
        write_json(folder / "config.json", {**record, "status": status})
    return status == "finished"


def _train_all(
    config: DemoConfig,
    device: torch.device,
    ranks: Ranks,
    stopped: Callable[[], bool],
    folder: Path | None,
) -> list[Measured]:
    """Train every method with every seed, until `stopped` returns True.

    Args:
        config: Options of the demo.
        device: Device to train on.
        ranks: The processes that train together.
        stopped: Returns whether to stop.
        folder: Folder of metrics and checkpoints; None to write nothing.
    """
    measured: list[Measured] = []

    def log(name: str, run: Training) -> None:
        sync_ranks(run)
        measured.append(Measured(name, run.config.seed, evaluation(run)))
        run.totals = no_totals(run.device)  # the next evaluation covers the steps from here on
        run.epoch_seconds = 0.0
        if folder is not None:
            append_json_line(folder / "metrics.jsonl", as_metrics_line(measured[-1]))

    with bars(Console(stderr=True), shown=folder is not None) as progress:
        total = config.steps * config.seeds
        rows = {m.name: progress.add_task(m.label, total=total) for m in METHODS}
        for seed in range(config.seed, config.seed + config.seeds):
            runs = {
                m.name: _build_run(train_config(m, config, seed), device, ranks) for m in METHODS
            }
            for name, run in runs.items():
                log(name, run)
            _train_in_turns(
                runs,
                config.steps,
                stopped=stopped,
                tick=lambda name: progress.advance(rows[name]),
                log=log,
            )
            if folder is not None:
                for name, run in runs.items():
                    path = folder / f"{name}-seed-{seed}.pt"
                    write_bytes(path, tensor_bytes(gf.state_dict(run.state)))
            if stopped():
                break
    return measured


def _build_run(config: TrainConfig, device: torch.device, ranks: Ranks) -> Training:
    run = build_training(config, device, ranks)
    state, totals, skipped = run.state, run.totals, run.skipped
    # The first step also loads code, so it is not timed; its results are discarded.
    advance(run, 1)
    run.state, run.totals, run.skipped = state, totals, skipped
    run.done, run.seconds, run.epoch_seconds = 0, 0.0, 0.0
    return run


def _train_in_turns(
    runs: Mapping[str, Training],
    steps: int,
    *,
    stopped: Callable[[], bool],
    tick: Callable[[str], None],
    log: Callable[[str, Training], None],
) -> None:
    """Train in turns from evaluation to evaluation, so that an interrupt finds all about equal."""
    every = evaluate_every(steps)
    for until in range(every, steps + every, every):
        for name, run in runs.items():
            before = run.done
            advance(run, min(until, steps), stopped=stopped, tick=partial(tick, name))
            if run.done > before:
                log(name, run)


def _report(config: DemoConfig, folder: Path, measured: Sequence[Measured]) -> bool:
    """Draw and print the results; return whether all trainings were finished."""
    last = {(m.run, m.seed): m.evaluation.step for m in measured}
    finished = _finished_seeds(config, measured)
    # Unfinished seeds would distort the means; without finished ones they are shown alone.
    shown = [m for m in measured if m.seed in finished] if finished else measured
    title = _title(config, len(finished), sorted(last.values()))
    write_bytes(folder / "curves.png", curves(shown, LABELS, title))
    print(title)
    # A file or pipe has no width, and 80 columns would break the lines.
    Console(width=None if sys.stdout.isatty() else 120).print(comparison(shown, LABELS))
    checkpoints = len(list(folder.glob("*.pt")))
    print(
        f"wrote {printable(folder)}/: metrics.jsonl, config.json, curves.png and {checkpoints} "
        "checkpoints, RUN-seed-SEED.pt"
    )
    return len(finished) == config.seeds


def _finished_seeds(config: DemoConfig, measured: Sequence[Measured]) -> set[int]:
    """Return the seeds for which every method has finished."""
    last = {(m.run, m.seed): m.evaluation.step for m in measured}
    return {seed for _, seed in last if all(last[n, seed] == config.steps for n in LABELS)}


def _title(config: DemoConfig, finished: int, steps: Sequence[int]) -> str:
    noise = f"digits, {100 * config.noise:g} % of the training labels wrong"
    if finished == config.seeds:
        seeds = f"mean ± sd of {config.seeds} seeds" if finished > 1 else f"seed {config.seed}"
        return f"{noise}, {config.steps} steps, {seeds}"
    if finished:
        return f"{noise}, interrupted: {finished} of {config.seeds} seeds finished"
    span = f"{steps[0]}" if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
    return f"{noise}, seed {config.seed}, interrupted after {span} of {config.steps} steps"
