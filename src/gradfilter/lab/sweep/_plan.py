"""What a study is made of, checked as a whole before anything starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from optuna.distributions import distribution_to_json

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.sweep._axes import Axis, Reader, axes_of, fields_of
from gradfilter.lab.sweep._config import SweepConfig
from gradfilter.lab.sweep._corners import check_all, check_places
from gradfilter.lab.train._config import PLACE, WATCHING, TrainConfig
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._place import plain_settings

Params = Mapping[str, Any]
"""What optuna chose, by setting."""
Evaluations = Literal["last", "best"]
Direction = Literal["maximize", "minimize"]
METRICS = tuple(field.name for field in fields(Evaluation) if field.name not in ("step", "epoch"))
SMALL_IS_GOOD = ("memorised", "noise_scale", "skipped", "surrogate_gap", "seconds", "peak_memory")
TRIALS = 20
MOST_CORNERS = 4096


@dataclass(frozen=True)
class Plan:
    """A study before its first training.

    Attributes:
        base: Settings that all trainings have in common.
        axes: Those that differ.
        points: All combinations of a grid, in order; None where they are searched for.
        trials: How many trainings there are to be.
        seed: Of the search.
        metric: What counts of an evaluation.
        evaluation: Of which, last or best.
        direction: maximize or minimize.
    """

    base: TrainConfig
    axes: tuple[Axis, ...]
    points: tuple[Params, ...] | None
    trials: int
    seed: int
    metric: str
    evaluation: Evaluations
    direction: Direction

    def config_of(self, params: Params) -> TrainConfig:
        """The settings of one training."""
        return _config_of(self.base, self.axes, params)

    def corners(self) -> list[TrainConfig]:
        """All trainings of a grid; those at the ends of all ranges of a search."""
        return _corners(self.base, self.axes, self.points)

    def definition(self) -> dict[str, Any]:
        """What everybody who joins the study has to agree on, as JSON knows it."""
        own = {axis.name for axis in self.axes} | {*PLACE, *WATCHING}
        shared = plain_settings(self.base)
        definition = {
            "sample" if self.points is None else "grid": {
                axis.name: json.loads(distribution_to_json(axis.distribution))["attributes"]
                for axis in self.axes
            },
            "metric": self.metric,
            "evaluation": self.evaluation,
            "direction": self.direction,
            "settings": {name: value for name, value in shared.items() if name not in own},
        }
        return dict(json.loads(json.dumps(definition)))


def plan_of(config: SweepConfig, base: TrainConfig, read: Reader) -> Plan:
    """The study that was asked for.

    Args:
        config: Options of sweep.
        base: Settings that all trainings have in common.
        read: Reads further options of train.

    Raises:
        UsageError: Something is wrong with one of its trainings, or with the study.
    """
    check(config.jobs >= 1, "--jobs", "at least 1", config.jobs, "Each is a process of its own.")
    check(config.heartbeat >= 1, "--heartbeat", "at least 1 second", config.heartbeat, "")
    seed = 0 if config.sampler_seed is None else config.sampler_seed
    check(seed >= 0, "--sampler-seed", "at least 0", seed, "")
    if bool(config.grid) == bool(config.sample):
        raise UsageError(
            "expected either --grid or --sample, found "
            f"{'both' if config.grid else 'neither'}. --grid seed=0,1,2 trains with three seeds."
        )
    if config.grid:
        axes = axes_of(config.grid, "--grid", read)
        if config.trials is not None:
            raise UsageError("--trials: a --grid says itself how many there are. Leave it away.")
        points = tuple(_points(axes))
        corners = _corners(base, axes, points)
        check_all(corners, "--grid")
        check_places(corners)
        if config.sampler_seed is not None:
            raise UsageError("--sampler-seed: a --grid is not searched. Leave it away.")
        return Plan(base, axes, points, len(points), 0, *_objective(config, corners))
    axes = axes_of(config.sample, "--sample", read)
    trials = TRIALS if config.trials is None else config.trials
    check(trials >= 1, "--trials", "at least 1", trials, f"{TRIALS} is the default.")
    corners = _corners(base, axes, None)
    check_all(corners, "--sample")
    return Plan(base, axes, None, trials, seed, *_objective(config, corners))


def key_of(params: Params) -> str:
    """Parameters as text that is the same for the same parameters."""
    return json.dumps(dict(params), sort_keys=True)


def _points(axes: tuple[Axis, ...]) -> Iterable[Params]:
    names = [axis.name for axis in axes]
    choices = [getattr(axis.distribution, "choices", ()) for axis in axes]
    return (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices))


def _config_of(base: TrainConfig, axes: tuple[Axis, ...], params: Params) -> TrainConfig:
    return _with(base, axes, [axis.value(params[axis.name]) for axis in axes])


def _corners(
    base: TrainConfig, axes: tuple[Axis, ...], points: Sequence[Params] | None
) -> list[TrainConfig]:
    if points is not None:
        return [_config_of(base, axes, point) for point in points]
    ends = itertools.product(*(axis.values for axis in axes))
    return [_with(base, axes, values) for values in itertools.islice(ends, MOST_CORNERS)]


def _with(base: TrainConfig, axes: tuple[Axis, ...], values: Sequence[Any]) -> TrainConfig:
    for axis, value in zip(axes, values, strict=True):
        base = replace(base, **fields_of(axis.name, value))
    return base


def _objective(
    config: SweepConfig, trainings: list[TrainConfig]
) -> tuple[str, Evaluations, Direction]:
    """Metric, evaluation and direction."""
    validated = all(training.val_split for training in trainings)
    metric = config.metric
    if metric is None:
        if config.sample and not validated:
            raise UsageError(
                "--sample: the search would be steered by the test labels. Give -- --val-split "
                "0.2, or --metric test_accuracy if that is meant."
            )
        metric = "val_accuracy" if validated else "test_accuracy"
    if metric not in METRICS:
        raise UsageError(f"--metric: expected one of {', '.join(METRICS)}, found {metric!r}.")
    if metric.startswith("val_") and not validated:
        raise UsageError(
            f"--metric {metric}: there is no validation split. Give -- --val-split 0.2."
        )
    small = metric.endswith("loss") or metric in SMALL_IS_GOOD
    direction: Direction = "minimize" if small else "maximize"
    return metric, config.evaluation, config.direction or direction
