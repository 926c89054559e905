"""Parse settings that differ from training to training: ``NAME=VALUE,VALUE``.

A value in brackets may contain commas: ``optimizer_arguments=[etas=0.4,1.1],[etas=0.5,1.2]``.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from gradfilter.lab._options import arguments
from gradfilter.lab._usage import UsageError, check, did_you_mean
from gradfilter.lab.sweep._bracketed_values import split_values
from gradfilter.lab.train._train_command import NESTEROV
from gradfilter.lab.train._train_config import PLACE, WATCHING, TrainConfig

Reader = Callable[[Sequence[str]], TrainConfig]
"""A function from options of train to its settings."""
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
SPLITS = ("train_split", "val_split")
"""Settings that are fractions below 1 and numbers of samples above."""
HINTS = typing.get_type_hints(TrainConfig)


@dataclass(frozen=True)
class Axis:
    """A setting and its possible values.

    Attributes:
        name: A field of `TrainConfig`.
        distribution: Distribution of the values, for optuna.
        values: All values, or the two ends of a range.
    """

    name: str
    distribution: Distribution
    values: tuple[Any, ...]

    def value(self, chosen: Any) -> Any:
        """Convert a choice of optuna to a value of the setting."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.values[self.distribution.choices.index(chosen)]
        # The number of digits in names of run directories: one value, one directory.
        plain = float(f"{chosen:g}") if isinstance(chosen, float) else chosen
        return type(self.values[0])(plain)

    def suggest(self, trial: Trial) -> None:
        """Let the sampler of a trial choose a value."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                trial.suggest_categorical(self.name, choices)
            case IntDistribution(low=low, high=high, log=log):
                trial.suggest_int(self.name, low, high, log=log)
            case FloatDistribution(low=lowest, high=highest, log=log):
                trial.suggest_float(self.name, lowest, highest, log=log)


def fields_of(name: str, value: Any) -> dict[str, Any]:
    """Return the settings of one value of an axis; sgd+nesterov stands for two.

    Examples:
        >>> fields_of("optimizer", "sgd+nesterov"), fields_of("seed", 1)
        ({'optimizer': 'sgd', 'nesterov': True}, {'seed': 1})
    """
    if (name, value) == ("optimizer", NESTEROV):
        return {"optimizer": "sgd", "nesterov": True}
    return {name: value}


def axes_of(typed: Sequence[str], option: str, read: Reader) -> tuple[Axis, ...]:
    """Parse axes.

    Args:
        typed: ``NAME=VALUE,VALUE``, and for ``--sample`` also ``NAME=LOW:HIGH``.
        option: ``--grid`` or ``--sample``.
        read: Reads options of train.

    Raises:
        UsageError: The setting does not exist, or it cannot have this value.
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
            axes.append(_choice(name, split_values(values, option, name), option, read))
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{option}: {name} is given twice. Give all its values at once.")
    if "nesterov" in names and any(NESTEROV in axis.values for axis in axes):
        raise UsageError(
            f"{option}: optimizer={NESTEROV} and nesterov contradict each other. "
            "Omit nesterov, or give optimizer=sgd."
        )
    return tuple(axes)


def _check_name(name: str, option: str) -> None:
    if name not in HINTS:
        hint = did_you_mean(name, HINTS)
        raise UsageError(
            f"{option}: train has no setting {name!r}.{hint} See gradfilter train --help."
        )
    if name in (*PLACE, *WATCHING):
        raise UsageError(
            f"{option}: {name} says where, how or how closely a training runs, and does not "
            "change it. Give it after --, for all trainings."
        )


def _choice(name: str, texts: Sequence[str], option: str, read: Reader) -> Axis:
    odd = [part for text in texts for part in text.split() if "=" not in part]
    if odd and name.endswith("_arguments"):
        raise UsageError(
            f"{option} {name}: expected NAME=VALUE in every value, found {odd[0]!r}. Put a value "
            f"that has commas in brackets: {name}=[{','.join(texts)}]."
        )
    values = tuple(_value(name, text, option, read) for text in texts)
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{option}: {name} has the value {value} twice. Give it once.")
    return Axis(name, CategoricalDistribution([plain_value(v) for v in values]), values)


def plain_value(value: Any) -> Any:
    """Convert a setting to a value of optuna and JSON."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


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
    counts = name in SPLITS and high >= 1
    if counts:
        check(
            low > 1 and float(low).is_integer() and float(high).is_integer(),
            f"--sample {name}",
            "fractions below 1, or whole numbers of samples above it, at both ends",
            text,
            f"{name}=0.1:0.5 and {name}=100:500 are such ranges.",
        )
    whole = counts or isinstance(low, int)
    distribution = (
        IntDistribution(int(low), int(high), log=log)
        if whole
        else FloatDistribution(low, high, log=log)
    )
    return Axis(name, distribution, (low, high))


def _value(name: str, text: str, option: str, read: Reader) -> Any:
    """Parse one value as train does."""
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
        value = getattr(read(arguments({name: plain})), name)
        return text if text == NESTEROV else value
    except UsageError as error:
        raise UsageError(f"{option} {name}={text}: {error}") from None


def _is_number(hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return int in kinds or float in kinds
