"""What a user may ask for, and the one line that says what was wrong with it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch

LARGEST = 2**62
"""What torch's and numpy's integers can hold, with room to count on."""
LONGEST = 120
"""Characters of a value that are shown; numbers may have any number of digits."""


class UsageError(ValueError):
    """A bad value: its message is one line that says what, why and how to mend it."""


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
    """Refuse whole numbers that no counter holds, and text that no file system takes.

    Args:
        value: A dataclass of options, or the value of one.
        option: How that one is called on the command line.

    Raises:
        UsageError: There is one.
    """
    if is_dataclass(value):
        for field in fields(value):
            refuse_odd(getattr(value, field.name), f"--{field.name.replace('_', '-')}")
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
    """A sentence with the nearest of some names, after a space; nothing where none is near.

    Args:
        typed: What is no name.
        known: The names.
        written: How one is written in a sentence.

    Examples:
        >>> did_you_mean("label-nose", ["label-noise", "seed"], "--{}")
        ' Did you mean --label-noise?'
        >>> did_you_mean("colour", ["label-noise", "seed"])
        ''
    """
    # Sorted, so that of two that are equally near it is always the same.
    near = difflib.get_close_matches(typed, sorted(known), n=1)
    return f" Did you mean {written.format(near[0])}?" if near else ""


def usable_device(name: str) -> torch.device:
    """The device of this name, if torch knows it and this machine has it.

    Raises:
        UsageError: It does not.
    """
    here = ["cpu", *_accelerators()]
    expected, fix = "a device of this machine", f"Available: {', '.join(here)}."
    try:
        device = torch.device(name)
    except RuntimeError:
        # What torch says here lists every back end that it was ever compiled for.
        device = None
    check(device is not None and str(device) in here, "--device", expected, repr(name), fix)
    assert device is not None
    return device


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    return [kind.type, *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]
