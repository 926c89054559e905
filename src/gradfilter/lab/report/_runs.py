"""Read trainings, their evaluations and their measurements from disk."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradfilter.lab._run_files import ForeignError, printable, reading
from gradfilter.lab._usage import LARGEST, UsageError
from gradfilter.lab.stats._stats_files import MOST, Document, read
from gradfilter.lab.train._evaluation import NUMBERS, read_evaluations
from gradfilter.lab.train._run_place import (
    METRICS,
    check_types,
    read_config,
    run_directories,
    without_record,
)
from gradfilter.lab.train._train_config import TrainConfig

# --- Evaluations of a training, as columns of numbers ---


def read_metrics(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read the evaluations of a run, with NaN for missing numbers; also note a cut last line.

    Raises:
        UsageError: There are no evaluations, or a line is not an evaluation.
    """
    evaluations, half = read_evaluations(path)
    cut = [f"{str(path)!r}: its last line is cut off."] if half else []
    if not evaluations:
        raise UsageError(f"{str(path)!r} has no evaluation yet.")
    rows = [[number(found.get(name)) for name in NUMBERS] for found in evaluations]
    found = pd.DataFrame(rows, columns=list(NUMBERS), dtype=float)
    return found.drop_duplicates("step", keep="last", ignore_index=True), cut


def number(value: Any) -> float:
    """Convert a value of a JSON file to a number; null is NaN.

    Raises:
        TypeError: The value is not a number.
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
        metric: Name of the metric.
        column: Name of the number, if the metric has several.
        split: Split of the data set.
        variant: Name of the file without checkpoint and range, which states the settings.
        plain: Whether it is measured at the images themselves, on the logits.
        checkpoint: Id of the checkpoint.
        step: Training step of the checkpoint.
        samples: Number of samples.
        mean: Mean over the samples.
        lipschitz: √(mean m²) for operator norms; otherwise NaN.
        wrong: Mean over the samples with wrong labels; NaN without any.
        right: Mean over the samples with right labels.
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
    """Read the measurements of a run; also return why others cannot be read.

    Of several files for parts of a split, use the one with most samples.
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
        return []  # running means along a path, not a single mean
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
            _mean_over_samples(facts, column, numbers),
            float(lipschitz[0]),
            _mean(numbers[wrong]) if per_sample and wrong.any() else math.nan,
            _mean(numbers[~wrong]) if per_sample else math.nan,
        )
        for column, numbers in zip(facts["columns"], values.T, strict=True)
    ]


def _mean_over_samples(facts: Mapping[str, Any], column: str, values: np.ndarray) -> float:
    """Return the mean; for noise scales, which may be infinite, the quotient of means of stats."""
    whole = facts["aggregate"].get(column)
    return float(whole) if isinstance(whole, int | float) else _mean(values)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


# --- Trainings on disk ---


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}

log = logging.getLogger("gradfilter.report")


@dataclass(frozen=True)
class RecordedRun:
    """A training on disk.

    Attributes:
        path: The run directory.
        status: running, interrupted, finished or failed.
        settings: Every field of `TrainConfig`, with the actual batch size.
        parameters: Number of parameters of the model; NaN if it was not recorded.
        versions: Versions of the software that trained it.
        metrics: One row per evaluation, in the order of the steps; a column per `Evaluation` field.
        measures: Results of ``gradfilter stats``.
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
        """Return whether the training has finished."""
        return self.status == "finished"

    @property
    def diverged(self) -> bool:
        """Return whether the training loss of the last evaluation is not finite."""
        return not math.isfinite(self.last("train_loss"))

    def last(self, name: str) -> float:
        """Return a number of the last evaluation."""
        return float(self.metrics[name].iloc[-1])

    def measured(self, metric: str, split: str) -> list[Measure]:
        """Return the measurements at the images themselves and the last step.

        Args:
            metric: Name of a metric of ``gradfilter stats``.
            split: Split of the data set.
        """
        return [
            measure
            for measure in self.measures
            if (measure.metric, measure.split) == (metric, split)
            and measure.plain
            and measure.step == self.last("step")
        ]

    def at_end(self, variant: str, number: str = "mean", column: str = "") -> float:
        """Return a number of a measurement at the last step; NaN if this variant was not measured.

        Args:
            variant: A variant, such as that of `usual_variant`.
            number: An attribute of `Measure`.
            column: Name of a number of a metric that has several; by default that of the metric.
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
    """Return the variant of a metric that most runs share; of several, the shortest name.

    Numbers of different variants cannot be compared. Without a measurement the name is empty.
    """
    ways = Counter(way for run in runs for way in {m.variant for m in run.measured(metric, split)})
    return min(ways, key=lambda way: (-ways[way], len(way)), default="")


def read_runs(dirs: Sequence[Path]) -> tuple[list[RecordedRun], list[str]]:
    """Read the trainings below some directories, each once; also return why others were skipped.

    Raises:
        UsageError: A directory does not exist.
    """
    runs, skipped = [], without_record(dirs)
    for place in run_directories(dirs):
        try:
            record = read_config(place)
        except UsageError as error:
            # Many programs write a config.json; only those of trainings are reported as skipped.
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


def _run(
    place: Path, record: Mapping[str, Any], metrics: pd.DataFrame, measures: tuple[Measure, ...]
) -> RecordedRun:
    known = {name: value for name, value in record["settings"].items() if name in DEFAULTS}
    settings: dict[str, Any] = DEFAULTS | known
    with reading(place / "config.json", "the record of a run", "The report omits it."):
        if "batch_size" in record:
            settings["batch_size"] = record["batch_size"]
            check_types({"batch_size": settings["batch_size"]})
        # The index of the device is arbitrary, like a seed.
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
    """Convert a setting to a value that can be a key and be printed."""
    if isinstance(value, list | tuple):
        return tuple(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= LARGEST else float(value)
    return printable(value) if isinstance(value, str | Path) else value
