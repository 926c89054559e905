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


def read_metrics(path: Path) -> pd.DataFrame:
    """The evaluations of a run; what was not measured is NaN.

    Raises:
        UsageError: There are none, or a line is none.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from None
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            rows.append([number(found.get(name)) for name in NUMBERS])
            int(found["step"])  # without it the line is nobody's
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{str(path)!r}, line {place}: not an evaluation.") from None
    if not rows:
        raise UsageError(f"{str(path)!r} has no evaluation yet.")
    return pd.DataFrame(rows, columns=list(NUMBERS), dtype=float).drop_duplicates(
        "step", keep="last", ignore_index=True
    )


def number(value: Any) -> float:
    """A number of a JSON file; null is NaN.

    Raises:
        TypeError: It is something else.
    """
    if value is not None and not isinstance(value, int | float):
        raise TypeError(value)
    return math.nan if value is None else float(value)
