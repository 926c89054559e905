"""Tables: one line per setting, mean ± sd over its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._parts import Table
from gradfilter.lab.report._runs import Run
from gradfilter.lab.report._spread import Spread, spread


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


Columns = Mapping[Column, Callable[[Run], float]]
"""Columns, and where a run has their numbers."""


def group_table(
    name: str, title: str, columns: Columns, groups: Sequence[Group], *, note: str = ""
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
    cells = [[spread(values) for values in row.values] for row in rows]
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


def state(group: Group) -> dict[str, Any]:
    """Which seeds a group has, and how far they are, for the CSV."""
    return {
        "runs": len(group.runs),
        "seeds": " ".join(str(run.settings["seed"]) for run in group.runs),
        "status": " ".join(sorted({run.status for run in group.runs})),
    }
