"""Whether a chain or a step is given what it began with: parameters, and a state of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

SHOWN = 6
"""So many names of each kind go into an error."""


def check_tree(who: str, params: Any, *, expected: str = "the parameters") -> None:
    """Refuse a module, or what it iterates over, where a dict of parameters is meant."""
    if not isinstance(params, dict):
        raise TypeError(
            f"{who}: expected {expected} as a dict[str, Tensor], found {type(params).__name__}. "
            "extract(model) gives one: params, buffers = extract(model)."
        )


def check_state(who: str, whose: str, state: Any, names: Collection[str], remedy: str) -> None:
    """Refuse a state that is none, or that somebody else's ``init`` made.

    Args:
        who: What the error begins with.
        whose: "chain" or "step".
        state: What was given; only its keys are looked at.
        names: The keys it has to have.
        remedy: How to come by the right one.
    """
    if not isinstance(state, dict):
        found = type(state).__name__
        raise TypeError(f"{who}: expected the state of this {whose}, found {found}. {remedy}")
    if set(state) != set(names):
        missing = [name for name in names if name not in state]
        extra = [str(name) for name in state if name not in names]
        raise ValueError(
            f"{who}: expected the state of this {whose}, missing {_shown(missing)}, extra "
            f"{_shown(extra)}. {remedy}"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{names[:SHOWN]}{more}"
