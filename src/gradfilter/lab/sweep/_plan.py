"""Plan a study, and check its trainings before anything starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from optuna.distributions import distribution_to_json

from gradfilter.lab._constraints import check_fields
from gradfilter.lab._usage import UsageError, option_name, typed_names
from gradfilter.lab.sweep._axes import Axis, Reader, axes_of, fields_of
from gradfilter.lab.sweep._sweep_config import TRIALS, SweepConfig
from gradfilter.lab.train._build_training import data_of, model_of
from gradfilter.lab.train._config_checks import check_values, refuse_ignored
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._run_place import place_of, plain_settings
from gradfilter.lab.train._train_command import expanded_options
from gradfilter.lab.train._train_config import PLACE, WATCHING, TrainConfig

# --- Check a study by its extreme trainings, which stand for all trainings between them ---


DATA = ("data", "noise_file", "image_size", "train_split", "val_split", "noise_type", "dtype")
"""Settings that determine the data set and whether it is available, without seeds."""
MODEL = ("model", "model_additions", "model_arguments", "weight_init")
"""Settings that determine the model."""
Values = tuple[Any, ...]


def check_all(corners: Sequence[TrainConfig], option: str) -> None:
    """Refuse values that are wrong for every data set and model.

    Raises:
        UsageError: One of the trainings has such a value.
    """
    for config in corners:
        try:
            check_values(config)
        except UsageError as error:
            raise _error_of_training(option, error) from None


def check_places(corners: Sequence[TrainConfig]) -> None:
    """Refuse two trainings in one directory.

    Raises:
        UsageError: Two trainings have the same run directory.
    """
    places = set()
    for config in corners:
        place = place_of(config)
        if place in places:
            raise UsageError(
                f"--grid: two trainings have the run directory {str(place)!r}. "
                "Choose values that differ in their first six digits."
            )
        places.add(place)


def refuse_unused(
    corners: Sequence[TrainConfig], axes: Sequence[Axis], typed: Sequence[str], own: str
) -> None:
    """Refuse options and axes that have no effect in any training.

    Args:
        corners: Extreme trainings of the study.
        axes: Axes of the study.
        typed: Options of train that all trainings share.
        own: ``--grid`` or ``--sample``.

    Raises:
        UsageError: An option or axis has no effect.
    """
    names = {axis.name for axis in axes}
    given = typed_names(expanded_options(typed))
    plain = {name.removeprefix("--").replace("-", "_") for name in given}
    said = plain | {name.removeprefix("no_") for name in plain}
    for name in sorted(said & names):
        raise UsageError(
            f"{option_name(name)}: {own} sets it in every training. Give it in one place."
        )
    for name in sorted(plain | names):
        _refuse_if_never_used(corners, name, f"{own}: " if name in names else "")


def check_there(corners: Sequence[TrainConfig], option: str) -> None:
    """Read every data set and build every model once.

    Raises:
        UsageError: A data set is missing on this machine, or a model does not exist.
    """
    device = torch.device("cpu")
    several: dict[Values, dict[Values, TrainConfig]] = {}
    for config in corners:
        data = (*_values(config, DATA), config.label_noise > 0)
        several.setdefault(data, {}).setdefault(_values(config, MODEL), config)
    for configs in several.values():
        try:
            found = data_of(next(iter(configs.values())), device)
            for config in configs.values():
                model_of(config, found)
        except UsageError as error:
            raise (_error_of_training(option, error) if len(corners) > 1 else error) from None


def _refuse_if_never_used(corners: Sequence[TrainConfig], name: str, owner: str) -> None:
    refusal = None
    for config in corners:
        try:
            refuse_ignored(config, [option_name(name)])
        except UsageError as error:
            refusal = UsageError(f"{owner}{error}")
        else:
            return
    if refusal is not None:
        raise refusal


def _values(config: TrainConfig, names: Sequence[str]) -> Values:
    return tuple(getattr(config, name) for name in names)


def _error_of_training(option: str, error: UsageError) -> UsageError:
    return UsageError(f"{option}: one of the trainings is refused: {str(error).strip()}")


# --- The plan ---


Params = Mapping[str, Any]
"""Choices of optuna, by setting."""
Evaluations = Literal["last", "best"]
Direction = Literal["maximize", "minimize"]
METRICS = tuple(field.name for field in fields(Evaluation) if field.name not in ("step", "epoch"))
SMALL_IS_GOOD = ("memorised", "noise_scale", "skipped", "surrogate_gap", "seconds", "peak_memory")
MOST_CORNERS = 4096


@dataclass(frozen=True)
class Plan:
    """A study before its first training.

    Attributes:
        base: Settings that all trainings share.
        axes: Settings that differ.
        points: All combinations of a grid, in order; None for a search.
        trials: Number of trainings.
        seed: Seed of the search.
        metric: The number of an evaluation to compare.
        evaluation: The evaluation to compare, last or best.
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
        """Return the settings of one training."""
        return _config_of(self.base, self.axes, params)

    def corners(self) -> list[TrainConfig]:
        """Return all trainings of a grid, or those at the ends of all ranges of a search."""
        return _corners(self.base, self.axes, self.points)

    def definition(self) -> dict[str, Any]:
        """Return what all workers of the study must agree on, as JSON values."""
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
    """Plan the study that the options describe.

    Args:
        config: Options of sweep.
        base: Settings that all trainings share.
        read: Parses further options of train.

    Raises:
        UsageError: Something is wrong with one of its trainings, or with the study.
    """
    check_fields(config)
    seed = 0 if config.sampler_seed is None else config.sampler_seed
    if bool(config.grid) == bool(config.sample):
        raise UsageError(
            "expected either --grid or --sample, found "
            f"{'both' if config.grid else 'neither'}. --grid seed=0,1,2 trains with three seeds."
        )
    if config.grid:
        axes = axes_of(config.grid, "--grid", read)
        if config.trials is not None:
            raise UsageError("--trials: a --grid fixes the number of trainings. Omit it.")
        points = tuple(_points(axes))
        corners = _corners(base, axes, points)
        check_all(corners, "--grid")
        check_places(corners)
        if config.sampler_seed is not None:
            raise UsageError("--sampler-seed: a --grid is not searched. Omit it.")
        return Plan(base, axes, points, len(points), 0, *_objective(config, corners))
    axes = axes_of(config.sample, "--sample", read)
    trials = TRIALS if config.trials is None else config.trials
    corners = _corners(base, axes, None)
    check_all(corners, "--sample")
    return Plan(base, axes, None, trials, seed, *_objective(config, corners))


def key_of(params: Params) -> str:
    """Return parameters as text; equal parameters give equal text."""
    return json.dumps(dict(params), sort_keys=True)


def _points(axes: tuple[Axis, ...]) -> Iterable[Params]:
    names = [axis.name for axis in axes]
    choices = [getattr(axis.distribution, "choices", ()) for axis in axes]
    return (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices))


def _config_of(base: TrainConfig, axes: tuple[Axis, ...], params: Params) -> TrainConfig:
    return _with_values(base, axes, [axis.value(params[axis.name]) for axis in axes])


def _corners(
    base: TrainConfig, axes: tuple[Axis, ...], points: Sequence[Params] | None
) -> list[TrainConfig]:
    if points is not None:
        return [_config_of(base, axes, point) for point in points]
    ends = itertools.product(*(axis.values for axis in axes))
    return [_with_values(base, axes, values) for values in itertools.islice(ends, MOST_CORNERS)]


def _with_values(base: TrainConfig, axes: tuple[Axis, ...], values: Sequence[Any]) -> TrainConfig:
    for axis, value in zip(axes, values, strict=True):
        base = replace(base, **fields_of(axis.name, value))
    return base


def _objective(
    config: SweepConfig, trainings: list[TrainConfig]
) -> tuple[str, Evaluations, Direction]:
    """Return metric, evaluation and direction."""
    validated = all(training.val_split for training in trainings)
    metric = config.metric
    if metric is None:
        if config.sample and not validated:
            raise UsageError(
                "--sample: the search would optimise the test accuracy. Give -- --val-split "
                "0.2, or --metric test_accuracy if you want that."
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
