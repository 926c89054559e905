"""Constraints on the values of options, which a field declares next to its type.

    label_noise: Annotated[float, FRACTION] = 0.0

`check_fields` checks all of them. Rules about several fields are in the checks of each command.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from gradfilter.lab._usage import check, option_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Constraint:
    """A condition on the value of a field; None is always allowed.

    Attributes:
        expected: The allowed values, in words.
        holds: Returns whether a value is allowed.
        fix: Advice for the user. ``{default}`` stands for the default of the field.
        each: Whether the condition is on every element of a tuple.
        shown: Converts a refused value for the message.
    """

    expected: str
    holds: Callable[[Any], bool]
    fix: str = ""
    each: bool = False
    shown: Callable[[Any], object] = str


SWITCH_OFF = "Omit it to switch it off."
USUAL = "{default} is the default."


def positive(fix: str = "") -> Constraint:
    """Return the constraint to finite numbers above 0."""
    return Constraint("a positive number", lambda value: 0 < value < math.inf, fix)


def at_least(lowest: int, fix: str = "", unit: str = "") -> Constraint:
    """Return the constraint to finite numbers that are not below another.

    Args:
        lowest: The smallest allowed number.
        fix: Advice for the user.
        unit: Unit of the number, such as ``" second"``.
    """
    return Constraint(f"at least {lowest}{unit}", lambda value: lowest <= value < math.inf, fix)


def at_most(highest: float, fix: str = "") -> Constraint:
    """Return the constraint to numbers that are not above another."""
    shown = f"{highest:g}" if isinstance(highest, float) else f"{highest}"
    return Constraint(f"at most {shown}", lambda value: value <= highest, fix)


def below_one(what: str, fix: str = "") -> Constraint:
    """Return the constraint to numbers in [0, 1).

    Args:
        what: The kind of number, such as ``"a fraction"``.
        fix: Advice for the user.
    """
    return Constraint(f"{what} in [0, 1)", lambda value: 0 <= value < 1, fix)


def distance(fix: str) -> Constraint:
    """Return the constraint to cosine distances."""
    return Constraint("a cosine distance in [0, 2]", lambda value: 0 <= value <= 2, fix)


FRACTION = below_one("a fraction")


def check_fields(config: DataclassInstance) -> None:
    """Check every field of a configuration against its constraints, in the order of the fields.

    Raises:
        UsageError: A value is not allowed.

    Examples:
        >>> from gradfilter.lab._demo_config import DemoConfig
        >>> check_fields(DemoConfig(seed=-1))
        Traceback (most recent call last):
            ...
        gradfilter.lab._usage.UsageError: --seed: expected at least 0, found -1. 0 is the default.
    """
    for name, default, constraints in _constraints(type(config)):
        value = getattr(config, name)
        for constraint in constraints:
            for part in value if constraint.each else (value,):
                check(
                    part is None or constraint.holds(part),
                    option_name(name),
                    constraint.expected,
                    constraint.shown(part),
                    constraint.fix.format(default=default),
                )


@cache
def _constraints(
    config: type[DataclassInstance],
) -> list[tuple[str, object, tuple[Constraint, ...]]]:
    """Return name, default and constraints of every field."""
    hints = get_type_hints(config, include_extras=True)
    return [
        (
            field.name,
            field.default,
            tuple(
                part
                for part in getattr(hints[field.name], "__metadata__", ())
                if isinstance(part, Constraint)
            ),
        )
        for field in fields(config)
    ]
