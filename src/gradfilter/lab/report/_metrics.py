"""The evaluations of a training, as numbers in columns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._evaluations import NUMBERS, read_evaluations


def read_metrics(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The evaluations of a run, what was not measured as NaN; and whether a last one was cut off.

    Raises:
        UsageError: There are none, or a line is none.
    """
    evaluations, half = read_evaluations(path)
    cut = [f"{str(path)!r}: its last line is cut off."] if half else []
    if not evaluations:
        raise UsageError(f"{str(path)!r} has no evaluation yet.")
    rows = [[number(found.get(name)) for name in NUMBERS] for found in evaluations]
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
