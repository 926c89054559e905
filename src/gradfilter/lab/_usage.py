"""What a user may ask for, and the one line that says what was wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch


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
        raise UsageError(f"{option}: expected {expected}, found {found}. {fix}".rstrip())


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
