"""What a user may ask of a model beside its name: additions and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.models._families import Family


def as_arguments(
    name: str, family: Family, additions: Sequence[str], kwargs: Mapping[str, int]
) -> dict[str, Any]:
    """Additions and keyword arguments, checked, as the family's function takes them.

    Raises:
        UsageError: The family does not have it; a value is out of range.

    Examples:
        >>> from gradfilter.lab.models._families import FAMILIES
        >>> as_arguments("mlp_64", FAMILIES["mlp_H"], ["dropout-0.1"], {"depth": 3})
        {'dropout': 0.1, 'depth': 3}
    """
    some = ", ".join(family.options) or "none"
    for option, value in kwargs.items():
        check(option in family.options, "model keyword", some, option, f"{name} has no other.")
        fair = is_whole(value) and 1 <= value <= 1000
        check(fair, option, "a whole number from 1 to 1000", value, "Leave it away.")
    return {**_additions(name, family, additions), **kwargs}


def _additions(name: str, family: Family, additions: Sequence[str]) -> dict[str, Any]:
    """The additions as keyword arguments of the family's function."""
    found: dict[str, Any] = {}
    for addition in additions:
        kind, _, amount = addition.partition("-")
        if kind not in family.additions or (kind == "batchnorm" and amount):
            some = ", ".join("dropout-P" if a == "dropout" else a for a in family.additions)
            raise UsageError(
                f"--model-additions: expected {some or 'none'} for {name}, found {addition!r}. "
                "Leave it away, or take another model."
            )
        fix = "Name it once."
        check(kind not in found, "--model-additions", f"{kind} once", list(additions), fix)
        found[kind] = True if kind == "batchnorm" else _probability(addition, amount)
    return found


def _probability(addition: str, amount: str) -> float:
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    fix = "dropout-0.1 is usual."
    check(0 < value < 1, "--model-additions", "dropout-P with 0 < P < 1", repr(addition), fix)
    return value


def is_whole(value: object) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
