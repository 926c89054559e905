"""Read trainings, their evaluations and their measurements from disk."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradfilter.lab._run_files import ForeignError, printable, reading
from gradfilter.lab._usage import LARGEST, UsageError
from gradfilter.lab.stats._stats_files import MOST, Document, read
from gradfilter.lab.train._evaluation import NUMBERS, read_evaluations
from gradfilter.lab.train._record import METRICS
from gradfilter.lab.train._run_place import check_types, read_config
from gradfilter.lab.train._train_config import TrainConfig

# --- Evaluations of a training, as columns of numbers ---


def read_metrics(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The evaluations of a run, what was not measured as NaN; and whether a last one was cut off.

    Raises:
        UsageError: There are none, or a line is none.
    """
    evaluations, half = read_evaluations(path)
    cut = [f"{str(path)!r}: its last line is cut off."] if half else []
    if not evaluations:
        raise UsageError(f"{str(path)!r} has no evaluation yet.")
    rows = [[number(found.get(name)) for name in NUMBERS] for found in evaluations]
    found = pd.DataFrame(rows, columns=list(NUMBERS), dtype=float)
    return found.drop_duplicates("step", keep="last", ignore_index=True), cut


def number(value: Any) -> float:
    """A number of a JSON file; null is NaN.

    Raises:
        TypeError: It is something else.
    """
    if value is not None and not isinstance(value, int | float):
        raise TypeError(value)
    return math.nan if value is None else float(value)


# --- Measurements of the checkpoints of a training ---


FOLDER = "stats"
PLAIN = {"gen_strategy": "none", "normalization": "none", "target_logit_only": False}


@dataclass(frozen=True)
class Measure:
    """One column of one file of numbers.

    Attributes:
        metric: What was measured.
        column: Which of its numbers, where there are several.
        split: On which samples.
        variant: The file's name without checkpoint and range: it names the settings.
        plain: Of the images themselves, differentiating the logits.
        checkpoint: Its id.
        step: Where the training stood.
        samples: How many there are.
        mean: Over them.
        lipschitz: √(mean m²) for operator norms; otherwise NaN.
        wrong: The mean over the samples with wrong labels; NaN if there are none.
        right: The mean over the others.
    """

    metric: str
    column: str
    split: str
    variant: str
    plain: bool
    checkpoint: int
    step: int
    samples: int
    mean: float
    lipschitz: float
    wrong: float
    right: float


def read_measures(run: Path) -> tuple[tuple[Measure, ...], list[str]]:
    """The measurements of a run, and why others cannot be read.

    Of files that measure parts of a split the largest counts.
    """
    chosen: dict[tuple[str, str, int], Measure] = {}
    unreadable = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            with reading(path, "the file of numbers", "Remove it, or measure again."):
                found = _measures(path, read(path))
        except UsageError as error:
            unreadable.append(str(error))
            continue
        for measure in found:
            key = (measure.variant, measure.column, measure.checkpoint)
            if key not in chosen or measure.samples > chosen[key].samples:
                chosen[key] = measure
    return tuple(chosen.values()), unreadable


def _measures(path: Path, document: Document) -> list[Measure]:
    facts = document["metadata"]
    settings: Mapping[str, Any] = facts["settings"]
    if facts["axes"][-1] not in ("sample", "column"):
        return []  # running values along a path, which have no one mean
    words = (settings["metric"], settings["dataset_split"], *facts["columns"])
    if not all(isinstance(word, str) for word in words):
        raise ForeignError("it does not say what was measured")
    at = facts["checkpoint"]
    if not all(type(at[name]) is int and 0 <= at[name] <= MOST for name in ("id", "step")):
        raise ForeignError("it does not say at which checkpoint")
    values = np.array(document["stats"], dtype=float)  # null becomes NaN
    values = values.reshape(len(values), -1)  # (samples, columns)
    start, stop = facts["samples"]
    per_sample = len(values) == len(document["targets"])
    wrong = np.array(document["targets"]) != np.array(document["ground_truths"])
    lipschitz = np.ravel(facts["aggregate"].get("lipschitz", math.nan)).astype(float)
    return [
        Measure(
            printable(settings["metric"]),
            printable(column),
            printable(settings["dataset_split"]),
            printable(path.stem.rsplit("-checkpoint-", 1)[0]),
            all(settings.get(name, value) == value for name, value in PLAIN.items()),
            at["id"],
            at["step"],
            stop - start,
            _of_all(facts, column, numbers),
            float(lipschitz[0]),
            _mean(numbers[wrong]) if per_sample and wrong.any() else math.nan,
            _mean(numbers[~wrong]) if per_sample else math.nan,
        )
        for column, numbers in zip(facts["columns"], values.T, strict=True)
    ]


def _of_all(facts: Mapping[str, Any], column: str, values: np.ndarray) -> float:
    """The mean; of noise scales, which may be infinite, the quotient of means that stats wrote."""
    whole = facts["aggregate"].get(column)
    return float(whole) if isinstance(whole, int | float) else _mean(values)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


# --- Trainings on disk ---


DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}

log = logging.getLogger("gradfilter.report")


@dataclass(frozen=True)
class RecordedRun:
    """One training.

    Attributes:
        path: Its directory.
        status: running, interrupted, finished or failed.
        settings: Every field of `TrainConfig`; the batch size as it was.
        parameters: Of the model; NaN if that was not recorded.
        versions: Of what trained it.
        metrics: One row per evaluation, in the order of the steps; a column per `Evaluation` field.
        measures: What ``gradfilter stats`` found.
    """

    path: Path
    status: str
    settings: Mapping[str, Any]
    parameters: float
    versions: Mapping[str, str]
    metrics: pd.DataFrame
    measures: tuple[Measure, ...]

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.status == "finished"

    def last(self, name: str) -> float:
        """A number of the last evaluation."""
        return float(self.metrics[name].iloc[-1])

    def measured(self, metric: str, split: str) -> list[Measure]:
        """What was measured of the images themselves at the last step.

        Args:
            metric: Of ``gradfilter stats``.
            split: On which samples.
        """
        return [
            measure
            for measure in self.measures
            if (measure.metric, measure.split) == (metric, split)
            and measure.plain
            and measure.step == self.last("step")
        ]

    def at_end(self, variant: str, number: str = "mean", column: str = "") -> float:
        """A number of a measurement at the last step; NaN if it was not measured in this way.

        Args:
            variant: One of `usual_variant`.
            number: An attribute of `Measure`.
            column: Which number of a metric that has several; the metric's name otherwise.
        """
        for measure in self.measures:
            if (
                measure.variant == variant
                and measure.column == (column or measure.metric)
                and measure.step == self.last("step")
            ):
                return float(getattr(measure, number))
        return math.nan


def usual_variant(runs: Iterable[RecordedRun], metric: str, split: str) -> str:
    """The way of measuring that most of these runs share, of several the shortest name; or none.

    Numbers that were measured with different settings are not to be compared.
    """
    ways = Counter(way for run in runs for way in {m.variant for m in run.measured(metric, split)})
    return min(ways, key=lambda way: (-ways[way], len(way)), default="")


def read_runs(dirs: Sequence[Path]) -> tuple[list[RecordedRun], list[str]]:
    """The trainings below some directories, each once, and why others were skipped.

    Raises:
        UsageError: A directory does not exist.
    """
    runs, skipped = [], _without_record(dirs)
    for place in _places(dirs):
        try:
            record = read_config(place)
        except UsageError as error:
            # Many programs write a config.json; only one of a training is missed.
            if (place / METRICS).exists():
                skipped.append(str(error))
            continue
        if record.get("command") != "train":
            continue
        try:
            measures, unreadable = read_measures(place)
            metrics, cut = read_metrics(place / METRICS)
            runs.append(_run(place, record, metrics, measures))
            skipped += [*cut, *unreadable]
        except UsageError as error:
            skipped.append(f"{error} ({record.get('status')})")
    for line in skipped:
        log.warning("skipped: %s", line)
    return runs, skipped


def _places(dirs: Sequence[Path]) -> Iterator[Path]:
    seen = set()
    for folder in dirs:
        if not folder.is_dir():
            raise UsageError(
                f"DIR: expected a directory with trainings, found none at {str(folder)!r}. "
                "gradfilter train writes into runs unless --save-dir names another."
            )
        for path in sorted(folder.rglob("config.json")):
            if (real := path.resolve()) not in seen:
                seen.add(real)
                yield path.parent


def _without_record(dirs: Sequence[Path]) -> list[str]:
    found = {path.resolve() for folder in dirs for path in folder.rglob(METRICS)}
    lost = sorted(path for path in found if not path.with_name("config.json").exists())
    return [f"{str(path)!r} has no config.json beside it." for path in lost]


def _run(
    place: Path, record: Mapping[str, Any], metrics: pd.DataFrame, measures: tuple[Measure, ...]
) -> RecordedRun:
    known = {name: value for name, value in record["settings"].items() if name in DEFAULTS}
    settings = DEFAULTS | known
    with reading(place / "config.json", "the record of a run", "It is left out."):
        if "batch_size" in record:
            settings["batch_size"] = record["batch_size"]
            check_types({"batch_size": settings["batch_size"]})
        # Which of several devices it was is chance, as with a seed.
        settings["device"] = settings["device"].split(":")[0]
        if settings["steps"] is not None:
            settings["epochs"] = None
        versions = dict(record.get("versions") or {})
        return RecordedRun(
            place,
            printable(record.get("status")),
            {name: _shown(value) for name, value in settings.items()},
            number(record.get("parameters")),
            {printable(name): printable(version) for name, version in versions.items()},
            metrics,
            measures,
        )


def _shown(value: Any) -> Any:
    """A setting as it may be a key, and be printed."""
    if isinstance(value, list | tuple):
        return tuple(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= LARGEST else float(value)
    return printable(value) if isinstance(value, str | Path) else value
