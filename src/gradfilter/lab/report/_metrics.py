"""The evaluations of a training, as numbers in columns."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._evaluation import Evaluation

NUMBERS = tuple(field.name for field in fields(Evaluation))


def read_metrics(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The evaluations of a run, what was not measured as NaN; and whether a last one was cut off.

    Raises:
        UsageError: There are none, or a line is none.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = ""
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from None
    # A kill may cut the line that is being written; what is before it is whole.
    whole, _, half = text.rpartition("\n")
    cut = [f"{str(path)!r}: its last line is cut off."] if half else []
    lines = whole.splitlines()
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            rows.append([number(found.get(name)) for name in NUMBERS])
            int(found["step"])  # without it the line is nobody's
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UsageError(f"{str(path)!r}, line {place}: not an evaluation.") from None
    if not rows:
        raise UsageError(f"{str(path)!r} has no evaluation yet.")
    found = pd.DataFrame(rows, columns=list(NUMBERS), dtype=float)
    return found.drop_duplicates("step", keep="last", ignore_index=True), cut


def number(value: Any) -> float:
    """A number of a JSON file; null is NaN.

    Raises:
        TypeError: It is something else.
    """
    if value is not None and not isinstance(value, int | float):
        raise TypeError(value)
    return math.nan if value is None else float(value)
