"""The parts of a report, and its tables: one line per setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from gradfilter.lab.report._runs import RecordedRun
from gradfilter.lab.report._settings import Setting, Spread, mean_and_sd

# --- Parts ---


@dataclass(frozen=True)
class Plot:
    """A figure, and the numbers in it.

    Attributes:
        name: Of the files, without their endings.
        title: Above it.
        note: Below it, for what the title does not say.
        alt: What it shows, for those who cannot see it.
        png: The image.
        size: Its width and height in pixels.
        data: All that was drawn, in full precision.
    """

    name: str
    title: str
    note: str
    alt: str
    png: bytes
    size: tuple[int, int]
    data: pd.DataFrame


@dataclass(frozen=True)
class Table:
    """A table, and the numbers in it.

    Attributes:
        name: Of the file, without its ending.
        title: Above it.
        note: Below it.
        headings: One per column; the first is that of the settings.
        rows: As they are shown.
        data: The same in full precision.
    """

    name: str
    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: pd.DataFrame


@dataclass(frozen=True)
class Section:
    """Figures and tables about one question.

    Attributes:
        name: For links within the page.
        title: Its heading.
        lead: What it is about.
        parts: Nothing if it is left out.
        left_out: What is not shown, and why.
    """

    name: str
    title: str
    lead: str
    parts: Sequence[Plot | Table] = ()
    left_out: Sequence[str] = ()


# --- Tables ---


@dataclass(frozen=True)
class Column:
    """What stands below a heading.

    Attributes:
        name: In the CSV.
        heading: On the page, with the unit.
        factor: From the number to the unit on the page.
        digits: Behind the point, on the page; None for four that count.
    """

    name: str
    heading: str
    factor: float = 100.0
    digits: int | None = 1


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: What it is about.
        settings: The same, for the CSV.
        values: For every column those of the runs; NaN where a run has none.
        runs: How many there are, if that is shown.
    """

    label: str
    settings: Mapping[str, Any]
    values: Sequence[Sequence[float]]
    runs: int | None = None


Columns = Mapping[Column, Callable[[RecordedRun], float]]
"""Columns, and where a run has their numbers."""


def group_table(
    name: str, title: str, columns: Columns, groups: Sequence[Setting], *, note: str = ""
) -> Table:
    """A line per group."""
    rows = [
        Row(
            group.label(),
            {**group.settings, **state(group)},
            [[of(run) for run in group.runs] for of in columns.values()],
            len(group.runs),
        )
        for group in groups
    ]
    return table(name, title, list(columns), rows, note=note)


def table(
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    note: str = "",
    first: str = "setting",
) -> Table:
    """Mean ± sd over runs.

    Columns without any number are in the CSV and not on the page, which says so. A number that
    only some of the runs have, because others diverged, is shown with how many they are.
    """
    cells = [[mean_and_sd(values) for values in row.values] for row in rows]
    kept = [i for i in range(len(columns)) if any(not math.isnan(row[i].mean) for row in cells)]
    missing = [column.heading for i, column in enumerate(columns) if i not in kept]
    if missing:
        note = f"{note} Not measured in any of these runs: {', '.join(missing)}.".strip()
    counted = any(row.runs is not None for row in rows)
    shown = [
        [
            row.label,
            *([str(row.runs)] if counted else []),
            *(_shown(cell[i], columns[i], len(row.values[i])) for i in kept),
        ]
        for row, cell in zip(rows, cells, strict=True)
    ]
    numbers = [
        {
            first: row.label,
            **row.settings,
            **{
                f"{column.name}_{part}": value
                for column, found in zip(columns, cell, strict=True)
                for part, value in found._asdict().items()
            },
        }
        for row, cell in zip(rows, cells, strict=True)
    ]
    headings = [first, *(["runs"] if counted else []), *(columns[i].heading for i in kept)]
    return Table(name, title, note, headings, shown, pd.DataFrame(numbers))


def _shown(cell: Spread, column: Column, runs: int) -> str:
    some = f" ({cell.runs} of {runs})" if 0 < cell.runs < runs else ""
    return cell.shown(column.factor, column.digits) + some


def state(group: Setting) -> dict[str, Any]:
    """Which seeds a group has, and how far they are, for the CSV."""
    return {
        "runs": len(group.runs),
        "seeds": " ".join(str(run.settings["seed"]) for run in group.runs),
        "status": " ".join(sorted({run.status for run in group.runs})),
    }
