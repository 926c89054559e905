"""The table at the end of a study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from gradfilter.lab._reading import printable
from gradfilter.lab.sweep._plan import Plan
from gradfilter.lab.sweep._results import Group

MOST_ROWS = 20


def table_of(plan: Plan, groups: Sequence[Group]) -> Table:
    """One line per setting, best first: mean ± sd over seeds, where there are several.

    Args:
        plan: Of the study.
        groups: Best first.
    """
    seeds = any(axis.name == "seed" for axis in plan.axes)
    shown = groups[:MOST_ROWS]
    tested = plan.metric != "test_accuracy" and any(group.tested for group in shown)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    names = [axis.name for axis in plan.axes if axis.name != "seed"]
    for name in names:
        table.add_column(name, overflow="fold")
    table.add_column(f"{plan.evaluation} {plan.metric}", justify="right")
    if tested:
        table.add_column("test_accuracy", justify="right")
    if seeds:
        table.add_column("seeds", justify="right")
    for group in shown:
        cells = [_text(group.settings[name]) for name in names]
        cells.append(spread(group.values))
        if tested:
            cells.append(spread(group.tested))
        if seeds:
            missing = group.trainings - len(group.values)
            cells.append(f"{len(group.values)}" + (f" of {group.trainings}" if missing else ""))
        table.add_row(*cells)
    better = "highest" if plan.direction == "maximize" else "lowest"
    few = f"The best {len(shown)} of {len(groups)}, " if len(groups) > len(shown) else ""
    table.caption = f"{few}{better} {plan.metric} first" + (
        "; mean ± standard deviation over seeds." if seeds else "."
    )
    return table


def spread(values: Sequence[float]) -> str:
    """``mean ± sd``; the sample deviation needs two values.

    Examples:
        >>> spread([0.9, 0.92]), spread([0.9]), spread([])
        ('0.9100 ± 0.0141', '0.9000', '-')
    """
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _text(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return escape(printable(text))
