"""Define the parts of a report, and build its tables: one line per setting."""

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
        name: Name of the files, without suffix.
        title: Title above the figure.
        note: Text below the figure, in addition to the title.
        alt: Text in place of the image, for screen readers.
        png: The image.
        size: Width and height of the image in pixels.
        data: All numbers that were drawn, in full precision.
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
        name: Name of the file, without suffix.
        title: Title above the table.
        note: Text below the table.
        headings: One heading per column; the first is that of the settings.
        rows: Cells as text.
        data: The numbers in full precision.
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
        name: Anchor of links within the page.
        title: Heading of the section.
        lead: First sentence, which states the question.
        parts: Figures and tables; empty if the section is omitted.
        left_out: Parts that are not shown, with the reason.
    """

    name: str
    title: str
    lead: str
    parts: Sequence[Plot | Table] = ()
    left_out: Sequence[str] = ()


# --- Tables ---


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Name in the CSV.
        heading: Heading on the page, with the unit.
        factor: Converts the number to the unit on the page.
        digits: Decimals on the page; None for four significant digits.
    """

    name: str
    heading: str
    factor: float = 100.0
    digits: int | None = 1


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: Label of the row.
        settings: Settings of the row, for the CSV.
        values: Values of the runs, for every column; NaN if a run has none.
        runs: Number of runs, or None if it is not shown.
    """

    label: str
    settings: Mapping[str, Any]
    values: Sequence[Sequence[float]]
    runs: int | None = None


Columns = Mapping[Column, Callable[[RecordedRun], float]]
"""Columns, with the functions that read their numbers of a run."""


def group_table(
    name: str, title: str, columns: Columns, groups: Sequence[Setting], *, note: str = ""
) -> Table:
    """Build a table with a line per group."""
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
    """Build a table of mean ± sd over runs.

    Columns without any number are in the CSV only, and a note says so. A number that only some runs
    have, because others diverged, is shown with the number of runs.
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
    """Return the seeds of a group and their progress, for the CSV."""
    return {
        "runs": len(group.runs),
        "seeds": " ".join(str(run.settings["seed"]) for run in group.runs),
        "status": " ".join(sorted({run.status for run in group.runs})),
    }
