"""Check values of options, and report a bad value in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path

LARGEST = 2**62
"""Largest integer for torch and numpy, with room for counting."""
LONGEST = 120
"""Largest number of characters of a value in a message; numbers may have any length."""


class UsageError(ValueError):
    """A bad value: its message is one line that says what, why and how to fix it."""


def option_name(field: str) -> str:
    """Return the name of a field on the command line.

    Examples:
        >>> option_name("label_noise")
        '--label-noise'
    """
    return f"--{field.replace('_', '-')}"


def typed_name(text: str) -> str:
    """Return the name of an option as it was typed; an underscore in it is a hyphen, as for tyro.

    Examples:
        >>> typed_name("--learning_rate=0.1")
        '--learning-rate'
    """
    return text.partition("=")[0].replace("_", "-")


def typed_names(options: Iterable[str]) -> set[str]:
    """Return the names of all options on a command line."""
    return {typed_name(text) for text in options if text.startswith("--")}


def check(condition: bool, option: str, expected: str, found: object, fix: str) -> None:
    """Raise a `UsageError` unless ``condition`` holds.

    Examples:
        >>> check(0 > 1, "--steps", ">= 1", 0, "800 is the default.")
        Traceback (most recent call last):
            ...
        gradfilter.lab._usage.UsageError: --steps: expected >= 1, found 0. 800 is the default.
    """
    if not condition:
        text = str(found)
        short = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
        raise UsageError(f"{option}: expected {expected}, found {short}. {fix}".rstrip())


def refuse_odd(value: object, option: str = "") -> None:
    """Refuse whole numbers that are too large, and text that no file system accepts.

    Args:
        value: A dataclass of options, or the value of one.
        option: Name of the option on the command line.

    Raises:
        UsageError: A value is refused.
    """
    if is_dataclass(value):
        for field in fields(value):
            refuse_odd(getattr(value, field.name), option_name(field.name))
    elif isinstance(value, tuple):
        for part in value:
            refuse_odd(part, option)
    elif isinstance(value, int):
        small = abs(value) <= LARGEST
        check(small, option, f"at most {LARGEST}, with either sign", value, "Take a smaller one.")
    elif isinstance(value, str | Path):
        _refuse_odd_text(str(value), option)
        sizes = [len(os.fsencode(part)) for part in Path(value).parts]
        fits = isinstance(value, str) or (max(sizes, default=0) <= 255 and sum(sizes) <= 4000)
        check(fits, option, "names of at most 255 bytes", repr(str(value)), "Take a shorter path.")


def _refuse_odd_text(text: str, option: str) -> None:
    check("\0" not in text, option, "text without NUL", repr(text), "Remove it.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        check(False, option, "text that can be written", ascii(text), "Remove half a character.")


def did_you_mean(typed: str, known: Iterable[str], written: str = "{}") -> str:
    """Return a sentence with the nearest of some names, after a space; empty if none is near.

    Args:
        typed: The unknown name.
        known: The known names.
        written: Format of a name in the sentence.

    Examples:
        >>> did_you_mean("label-nose", ["label-noise", "seed"], "--{}")
        ' Did you mean --label-noise?'
        >>> did_you_mean("colour", ["label-noise", "seed"])
        ''
    """
    # Sorted, so that the result for two equally near names is deterministic.
    near = difflib.get_close_matches(typed, sorted(known), n=1)
    return f" Did you mean {written.format(near[0])}?" if near else ""
