"""Define the parts of a report, and build its tables: one line per setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from gradfilter.lab.report._legend import Line, line_of
from gradfilter.lab.report._runs import RecordedRun
from gradfilter.lab.report._settings import Setting, Spread, mean_and_sd, order

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
class TableRow:
    """A line of a table as it is shown.

    Attributes:
        cells: Cells as text, the first of them the name of the line.
        line: The line of the legend, or None.
        best: Indices of the cells that hold the best value of their column.
        new_problem: Whether the line is about another problem than the line above it.
    """

    cells: Sequence[str]
    line: Line | None = None
    best: frozenset[int] = frozenset()
    new_problem: bool = False


@dataclass(frozen=True)
class Table:
    """A table, and the numbers in it.

    Attributes:
        name: Name of the file, without suffix.
        title: Title above the table.
        note: Text below the table.
        headings: One heading per column; the first is that of the settings.
        rows: The lines of the table.
        data: The numbers in full precision.
    """

    name: str
    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[TableRow]
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
        better: Which value is the best; None if the column measures no success.
    """

    name: str
    heading: str
    factor: float = 100.0
    digits: int | None = 1
    better: Literal["highest", "lowest"] | None = None


PROBLEM = (
    *("data", "noise_file", "image_size", "train_split", "val_split", "label_noise", "noise_type"),
)
"""Settings that decide the task to learn; values are compared only where these are equal."""
BEST = "Bold: the best of a column"


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: Label of the row.
        settings: Settings of the row, for the CSV.
        values: Values of the runs, for every column; NaN if a run has none.
        runs: Number of runs, or None if it is not shown.
        line: The line of the legend, or None.
        problem: The task to learn; the best value is that of one task.
        never_best: Indices of the columns whose value is never marked as the best one.
    """

    label: str
    settings: Mapping[str, Any]
    values: Sequence[Sequence[float]]
    runs: int | None = None
    line: Line | None = None
    problem: tuple[Any, ...] = ()
    never_best: frozenset[int] = frozenset()


Columns = Mapping[Column, Callable[[RecordedRun], float]]
"""Columns, with the functions that read their numbers of a run."""


def group_table(
    name: str,
    title: str,
    columns: Columns,
    groups: Sequence[Setting],
    *,
    note: str = "",
    counts: Callable[[RecordedRun], bool] = lambda run: True,
) -> Table:
    """Build a table with a line per group, the best one first.

    Settings of one data set and label noise stay together, in natural order. Within them, settings
    are ordered by validation accuracy, or by the first column if it was not measured everywhere.
    Settings that are unfinished, that diverged or that have a run which does not count come last,
    and none of their values is marked as the best one. Those without a number in some run also come
    last.

    Args:
        name: Name of the file, without suffix.
        title: Title above the table.
        columns: Columns, with the functions that read their numbers of a run.
        groups: Settings, one per line.
        note: Text below the table, before that about the order.
        counts: Whether the numbers of a run may be the best ones; by default always.
    """
    ranked = list(columns)
    validation = next((i for i, c in enumerate(ranked) if c.name == "val_accuracy"), None)
    rows = [
        Row(
            group.label(),
            {**group.settings, **state(group)},
            [[of(run) for run in group.runs] for of in columns.values()],
            len(group.runs),
            line_of(group),
            tuple(group.runs[0].settings[n] for n in PROBLEM),
            frozenset() if _may_be_best(group, counts) else frozenset(range(len(ranked))),
        )
        for group in groups
    ]
    by = 0
    if validation is not None and all(_is_complete(row.values[validation]) for row in rows):
        by = validation
    problems = {row.problem for row in rows}
    rows.sort(
        key=lambda row: (*map(order, row.problem), bool(row.never_best), *rank(row.values[by]))
    )
    if len(rows) > 1:
        within = " within each data set and label noise" if len(problems) > 1 else ""
        note = f"{note} Ordered by {ranked[by].heading}{within}. {BEST}{within}.".strip()
    return table(name, title, ranked, rows, note=note)


def _may_be_best(group: Setting, counts: Callable[[RecordedRun], bool]) -> bool:
    return group.finished and all(not run.diverged and counts(run) for run in group.runs)


def rank(values: Sequence[float]) -> tuple[bool, float]:
    """Return a sort key: the highest mean first, and numbers that some runs lack last.

    Examples:
        >>> sorted([[0.5], [0.9, math.nan], [0.7]], key=rank)
        [[0.7], [0.5], [0.9, nan]]
    """
    mean = mean_and_sd(values).mean
    return not _is_complete(values), math.inf if math.isnan(mean) else -mean


def _is_complete(values: Sequence[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))


def table(
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    note: str = "",
    first: str = "setting",
) -> Table:
    """Build a table of mean ± sd over runs, in the order of the rows.

    Columns without any number are in the CSV only, and a note says so. A number that only some runs
    have, because others diverged, is shown with the number of runs.
    """
    cells = [[mean_and_sd(values) for values in row.values] for row in rows]
    kept = [i for i in range(len(columns)) if any(not math.isnan(row[i].mean) for row in cells)]
    missing = [column.heading for i, column in enumerate(columns) if i not in kept]
    if missing:
        note = f"{note} Not measured in any of these runs: {', '.join(missing)}.".strip()
    counted = any(row.runs is not None for row in rows)
    best = [_best_rows(column, rows, place) for place, column in enumerate(columns)]
    names = 2 if counted else 1  # cells before the numbers
    shown = [
        TableRow(
            [
                row.label,
                *([str(row.runs)] if counted else []),
                *(_shown(cell[i], columns[i], len(row.values[i])) for i in kept),
            ],
            row.line,
            frozenset(names + place for place, i in enumerate(kept) if number in best[i]),
            number > 0 and row.problem != rows[number - 1].problem,
        )
        for number, (row, cell) in enumerate(zip(rows, cells, strict=True))
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


def _best_rows(column: Column, rows: Sequence[Row], place: int) -> set[int]:
    """Return the rows with the best mean of a column, by problem; none where all are equal."""
    if column.better is None:
        return set()
    sign = 1 if column.better == "highest" else -1
    by_problem: dict[tuple[Any, ...], dict[int, float]] = {}
    for number, row in enumerate(rows):
        if place not in row.never_best and _is_complete(row.values[place]):
            mean = sign * mean_and_sd(row.values[place]).mean
            by_problem.setdefault(row.problem, {})[number] = mean
    return {
        number
        for means in by_problem.values()
        for number, mean in means.items()
        if mean == max(means.values()) > min(means.values())
    }


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
