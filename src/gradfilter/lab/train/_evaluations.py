"""The evaluations of a run as they are read again, from its ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from gradfilter.lab._reading import ForeignError, content_of, json_of, reading
from gradfilter.lab.train._evaluation import Evaluation

NUMBERS = tuple(field.name for field in fields(Evaluation))
FIX = "Remove the line, with which its evaluation is lost, and repeat the command."


def read_evaluations(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The evaluations in a file, none if there is no file; and whether a last one was cut off.

    A kill may cut the line that is being written, which has no end of line then. What is before it
    is whole.

    Raises:
        UsageError: The file cannot be read, or one of its other lines is not an evaluation.
    """
    with reading(path, "the metrics", "Move it away, and repeat the command."):
        whole, _, half = content_of(path).rpartition(b"\n") if path.exists() else (b"", b"", b"")
    found = []
    for place, line in enumerate(whole.split(b"\n") if whole else (), 1):
        with reading(path, f"line {place} of the metrics", FIX):
            found.append(_evaluation(json_of(line)))
    return found, bool(half)


def _evaluation(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ForeignError("it is not an evaluation")
    for name in NUMBERS:
        value = found.get(name)
        if value is not None and not isinstance(value, int | float):
            raise ForeignError(f"its {name} is not a number")
        float(value or 0)  # an OverflowError where an integer has hundreds of digits
    return found
