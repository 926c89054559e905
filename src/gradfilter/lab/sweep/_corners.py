"""The outermost trainings of a study, which stand for those between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._axes import Axis
from gradfilter.lab.train._begin import data_of, model_of
from gradfilter.lab.train._check import check_values, option
from gradfilter.lab.train._command import spelt_out
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._ignored import refuse_ignored
from gradfilter.lab.train._place import place_of

DATA = ("data", "noise_file", "image_size", "train_split", "val_split", "noise_type", "dtype")
"""Which data set it is and whether it can be had, whatever the seeds."""
MODEL = ("model", "model_additions", "model_arguments", "weight_init")
"""Which model it is."""
Values = tuple[Any, ...]


def check_all(corners: Sequence[TrainConfig], option: str) -> None:
    """Refuse values that no data set and no model can make right.

    Raises:
        UsageError: One of the trainings has such.
    """
    for config in corners:
        try:
            check_values(config)
        except UsageError as error:
            raise _of_one(option, error) from None


def check_places(corners: Sequence[TrainConfig]) -> None:
    """Refuse two trainings in one directory.

    Raises:
        UsageError: There are two.
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
    """Refuse options and axes that change nothing in any training.

    Args:
        corners: Of the study.
        axes: Of the study.
        typed: Options of train that all trainings have in common.
        own: ``--grid`` or ``--sample``.

    Raises:
        UsageError: One does nothing.
    """
    names = {axis.name for axis in axes}
    plain = {
        text.partition("=")[0].removeprefix("--").replace("-", "_")
        for text in spelt_out(typed)
        if text.startswith("--")
    }
    said = plain | {name.removeprefix("no_") for name in plain}
    for name in sorted(said & names):
        raise UsageError(
            f"{option(name)}: {own} says what it is in every training. Give it in one place."
        )
    for name in sorted(plain | names):
        _refuse_if_never_used(corners, name, f"{own}: " if name in names else "")


def check_there(corners: Sequence[TrainConfig], option: str) -> None:
    """Read every data set and make every model once.

    Raises:
        UsageError: A data set is missing here, or there is no such model.
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
            raise (_of_one(option, error) if len(corners) > 1 else error) from None


def _refuse_if_never_used(corners: Sequence[TrainConfig], name: str, whose: str) -> None:
    refusal = None
    for config in corners:
        try:
            refuse_ignored(config, [option(name)])
        except UsageError as error:
            refusal = UsageError(f"{whose}{error}")
        else:
            return
    if refusal is not None:
        raise refusal


def _values(config: TrainConfig, names: Sequence[str]) -> Values:
    return tuple(getattr(config, name) for name in names)


def _of_one(option: str, error: UsageError) -> UsageError:
    return UsageError(f"{option}: one of the trainings is refused: {str(error).strip()}")
