"""Settings that differ from training to training, as they are typed: ``NAME=VALUE,VALUE``."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from gradfilter.lab._options import arguments
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._config import PLACE, WATCHING, TrainConfig

Reader = Callable[[Sequence[str]], TrainConfig]
"""From options of train to its settings."""
HINTS = typing.get_type_hints(TrainConfig)


@dataclass(frozen=True)
class Axis:
    """One setting and what it may be.

    Attributes:
        name: A field of `TrainConfig`.
        distribution: As optuna knows it.
        values: All values, or the two ends of a range.
    """

    name: str
    distribution: BaseDistribution
    values: tuple[Any, ...]

    def value(self, chosen: Any) -> Any:
        """The setting that optuna's choice stands for."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.values[self.distribution.choices.index(chosen)]
        # As many digits as the name of a run directory has: one value, one directory.
        return float(f"{chosen:g}") if isinstance(chosen, float) else chosen


def axes_of(typed: Sequence[str], option: str, read: Reader) -> tuple[Axis, ...]:
    """Axes as they were typed.

    Args:
        typed: ``NAME=VALUE,VALUE``, and for ``--sample`` also ``NAME=LOW:HIGH``.
        option: ``--grid`` or ``--sample``.
        read: Reads options of train.

    Raises:
        UsageError: There is no such setting, or it cannot have such a value.
    """
    axes = []
    for text in typed:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise UsageError(
                f"{option}: expected NAME=VALUE,VALUE, found {text!r}. "
                f"{option} seed=0,1,2 trains with three seeds."
            )
        _check_name(name, option)
        if option == "--sample" and ":" in values and _is_number(HINTS[name]):
            axes.append(_range(name, values, read))
        else:
            axes.append(_choice(name, values.split(","), option, read))
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{option}: {name} is given twice. Give all its values at once.")
    return tuple(axes)


def as_typed(table: Any, key: str) -> list[str]:
    """A table or list of a configuration file as it would be typed.

    Example:
        >>> as_typed({"seed": [0, 1], "betas": [[0.9, 0.99], [0.5, 0.9]]}, "grid")
        ['seed=0,1', 'betas=0.9 0.99,0.5 0.9']
    """
    if isinstance(table, list) and all(isinstance(line, str) for line in table):
        return table
    if not isinstance(table, Mapping):
        raise UsageError(f"--config: expected [sweep.{key}] to be a table, found {table!r}.")
    return [
        f"{name}={','.join(map(_text, value)) if isinstance(value, list) else _text(value)}"
        for name, value in table.items()
    ]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_name(name: str, option: str) -> None:
    if name not in HINTS:
        near = difflib.get_close_matches(name, HINTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"{option}: train has no setting {name!r}.{hint} See gradfilter train --help."
        )
    if name in (*PLACE, *WATCHING):
        raise UsageError(
            f"{option}: {name} says where, how or how closely a training is done, and makes it no "
            "other one. Give it after --, for all trainings."
        )


def _choice(name: str, texts: Sequence[str], option: str, read: Reader) -> Axis:
    values = tuple(_value(name, text, option, read) for text in texts)
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{option}: {name} has the value {value} twice. Give it once.")
    plain = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values]
    return Axis(name, CategoricalDistribution(plain), values)


def _range(name: str, text: str, read: Reader) -> Axis:
    log = text.startswith("log:")
    ends = text.removeprefix("log:").split(":")
    if len(ends) != 2:
        raise UsageError(
            f"--sample: expected {name}=LOW:HIGH or {name}=log:LOW:HIGH, found {text!r}."
        )
    low, high = (_value(name, end, "--sample", read) for end in ends)
    if None in (low, high) or not low < high:
        raise UsageError(f"--sample: expected {name}=LOW:HIGH with LOW below HIGH, found {text!r}.")
    if log and low <= 0:
        raise UsageError(f"--sample: expected {name}=log:LOW:HIGH with LOW above 0, found {low}.")
    whole = isinstance(low, int)
    distribution = (
        IntDistribution(low, high, log=log) if whole else FloatDistribution(low, high, log=log)
    )
    return Axis(name, distribution, (low, high))


def _value(name: str, text: str, option: str, read: Reader) -> Any:
    """One value, read as train reads it."""
    plain: Any = text
    if typing.get_origin(HINTS[name]) is tuple:
        plain = text.split()
    elif not text:
        raise UsageError(f"{option}: {name} has an empty value. Expected {name}=VALUE,VALUE.")
    elif HINTS[name] is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{option} {name}: expected true or false, found {text!r}.")
        plain = text.lower() == "true"
    try:
        return getattr(read(arguments({name: plain})), name)
    except UsageError as error:
        raise UsageError(f"{option} {name}={text}: {error}") from None


def _is_number(hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return int in kinds or float in kinds
