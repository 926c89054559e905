"""Settings as a run recorded them, which are read again by whoever measures or reports it."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradfilter.lab._reading import ForeignError
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._check import check_values
from gradfilter.lab.train._config import TrainConfig

HINTS = typing.get_type_hints(TrainConfig)
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def check_types(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are of another type than in this version.

    Raises:
        ForeignError: One is.
    """
    for name, value in settings.items():
        if name in HINTS:
            _typed(name, HINTS[name], value)


def config_of(settings: Mapping[str, Any], what: str) -> TrainConfig:
    """Settings as they were recorded. They are not read as options: one could smuggle in another.

    Args:
        settings: Of a ``config.json``.
        what: Whose they are, for the error.

    Raises:
        UsageError: They are not settings of this version.
    """
    unknown = sorted(settings.keys() - HINTS.keys())
    try:
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ForeignError(f"this version does not know its settings {names}")
        config = TrainConfig(**{n: _typed(n, HINTS[n], value) for n, value in settings.items()})
        check_values(config)
    except ValueError as error:  # ForeignError and UsageError
        raise UsageError(f"{what} cannot be used: {str(error).rstrip('.')}.") from None
    return config


def _typed(name: str, hint: Any, value: Any) -> Any:
    """A value of JSON as the type that a setting has.

    Raises:
        ForeignError: It is none.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _typed(name, parts[0], value)
    if origin is typing.Literal and value in parts and isinstance(value, str):
        return value
    if origin is tuple and isinstance(value, list):
        many = parts[-1] is Ellipsis
        if many or len(value) == len(parts):
            return tuple(_typed(name, parts[0], part) for part in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and (isinstance(value, float) or abs(value) < 2**1000):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    expected = WORDS.get(hint, "one of its values" if origin is typing.Literal else "text")
    raise ForeignError(
        f"its setting {name} does not fit this version: {value!r:.80} is not {expected}"
    )
