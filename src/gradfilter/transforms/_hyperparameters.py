"""Return the hyperparameters of a chain as a flat dict, for the log of an experiment."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gradfilter._factory import shown
from gradfilter._types import Transform
from gradfilter.transforms._chain import names_of

PLAIN = (bool, int, float, str, type(None))


def hyperparameters(transform: Transform) -> dict[str, bool | int | float | str | None]:
    """Return every argument of every transform of a chain, defaults included.

    Args:
        transform: A chain, or one transform.

    Returns:
        Flat, in the order of the chain: ``"agree_filter/threshold": 0.97``. The names of transforms
        are those of ``info`` and of the state. An argument that is a chain or a mapping gives
        longer names (``"partition/branches/head/sgd/lr"``), a tuple gives ``"adam/betas/0"``.
        Numbers, strings, bools and None are given as they are; everything else as text: a schedule
        as the call that made it, a function by its name, a tensor by its shape. No tensor is read.

    Raises:
        TypeError: ``transform`` is not a transform.

    Examples:
        >>> import gradfilter as gf
        >>> update = gf.chain(gf.clip_per_row(1.0), gf.mean_rows(), gf.sgd(0.1, momentum=0.9))
        >>> found = gf.hyperparameters(update)
        >>> found["clip_per_row/max_norm"], found["sgd/momentum"], found["sgd/nesterov"]
        (1.0, 0.9, False)
    """
    if not isinstance(transform, Transform):
        raise TypeError(
            f"hyperparameters: expected a transform or a chain, found {type(transform).__name__}."
        )
    found: dict[str, bool | int | float | str | None] = {}
    _collect(transform, "" if transform.parts else transform.name, found)
    return found


def _collect(value: Any, prefix: str, found: dict[str, Any]) -> None:
    """Write the plain values inside ``value`` under names that begin with the prefix."""
    if isinstance(value, Transform):
        for name, argument in _arguments(value):
            _collect(argument, f"{prefix}/{name}" if prefix else name, found)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{prefix}/{key}", found)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _collect(item, f"{prefix}/{i}", found)
    else:
        found[prefix] = value if isinstance(value, PLAIN) else shown(value)


def _arguments(transform: Transform) -> list[tuple[str, Any]]:
    """Return the transforms of a chain by name, or the arguments of another transform."""
    if transform.parts:
        return list(zip(names_of(transform.parts), transform.parts, strict=True))
    call = transform.call
    if call is None:
        return []
    bound = call.bound()
    bound.apply_defaults()
    variable = {
        name: parameter.kind is inspect.Parameter.VAR_KEYWORD
        for name, parameter in bound.signature.parameters.items()
    }
    named: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        named += value.items() if variable[name] else [(name, value)]
    return named
