"""Trainings as they lie on disk."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from gradfilter.lab._reading import printable, reading
from gradfilter.lab._usage import LARGEST, UsageError
from gradfilter.lab.report._measures import Measure, read_measures
from gradfilter.lab.report._metrics import number, read_metrics
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._place import read_config
from gradfilter.lab.train._record import METRICS
from gradfilter.lab.train._stored import check_types

DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}

log = logging.getLogger("gradfilter.report")


@dataclass(frozen=True)
class Run:
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


def usual_variant(runs: Iterable[Run], metric: str, split: str) -> str:
    """The way of measuring that most of these runs share, of several the shortest name; or none.

    Numbers that were measured with different settings are not to be compared.
    """
    ways = Counter(way for run in runs for way in {m.variant for m in run.measured(metric, split)})
    return min(ways, key=lambda way: (-ways[way], len(way)), default="")


def read_runs(dirs: Sequence[Path]) -> tuple[list[Run], list[str]]:
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
) -> Run:
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
        return Run(
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
