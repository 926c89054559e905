"""The tables of measurements, and of the runs themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._measures import Measure
from gradfilter.lab.report._metrics import NUMBERS
from gradfilter.lab.report._parts import Section, Table
from gradfilter.lab.report._spread import spread
from gradfilter.lab.report._table import Column, Row, table

NUMBERS_OF = {
    "mean": "mean",
    "lipschitz": "√(mean σ²)",
    "right": "at right labels",
    "wrong": "at wrong labels",
}


def measurements(groups: Sequence[Group]) -> Section:
    """What ``gradfilter stats`` found, at the last checkpoint that it measured."""
    name, title = "measurements", "Measurements of checkpoints"
    lead = "What gradfilter stats found at the last checkpoint that was measured in every run."
    rows = [row for group in groups for row in _rows(group)]
    rows.sort(key=lambda row: (row.settings["variant"], row.settings["column"]))  # groups in order
    if not rows:
        why = "Needs gradfilter stats on some of these runs."
        return Section(name, title, lead, left_out=[why])
    columns = [
        Column("checkpoint_step", "step", 1.0, 0),
        Column("samples", "samples", 1.0, 0),
        *(Column(number, heading, 1.0, 3) for number, heading in NUMBERS_OF.items()),
    ]
    note = "Mean ± sd over seeds, of the mean over samples."
    return Section(
        name,
        title,
        lead,
        [table("measurements", "Per metric and setting", columns, rows, note=note)],
    )


def _rows(group: Group) -> list[Row]:
    last: dict[tuple[str, str], dict[int, Measure]] = {}
    for number, run in enumerate(group.runs):
        for measure in run.measures:
            of_runs = last.setdefault((measure.variant, measure.column), {})
            if number not in of_runs or measure.step > of_runs[number].step:
                of_runs[number] = measure
    found = []
    for (variant, column), of_runs in last.items():
        measures = list(of_runs.values())
        what = variant if column == measures[0].metric else f"{variant}, {column.replace('_', ' ')}"
        settings = {"metric": measures[0].metric, "column": column, "variant": variant}
        values = [[getattr(m, n) for m in measures] for n in ("step", "samples", *NUMBERS_OF)]
        found.append(
            Row(f"{what}: {group.label()}", {**settings, **group.settings}, values, len(measures))
        )
    return found


def overview(groups: Sequence[Group]) -> Section:
    """Every run, its state and where it is."""
    rows, numbers = [], []
    for group in groups:
        for run in group.runs:
            facts = {
                "run": str(run.path),
                "setting": group.label(),
                "seed": run.settings["seed"],
                "status": run.status,
                "parameters": run.parameters,
                **{name: run.last(name) for name in NUMBERS},
            }
            numbers.append({**facts, **{f"setting_{n}": v for n, v in run.settings.items()}})
            rows.append(
                [
                    facts["setting"],
                    str(facts["seed"]),
                    run.status,
                    "–" if math.isnan(run.parameters) else f"{run.parameters:.0f}",
                    f"{run.last('step'):.0f}",
                    f"{run.last('epoch'):.4g}",
                    spread([run.last("seconds")]).shown(),
                    facts["run"],
                ]
            )
    headings = [
        "setting",
        "seed",
        "status",
        "parameters",
        "steps",
        "epochs",
        "seconds",
        "directory",
    ]
    note = "The CSV has every setting, and every number of the last evaluation."
    listed = Table("runs", "All of them", note, headings, rows, pd.DataFrame(numbers))
    return Section("runs", "Runs", "What this page is made of.", [listed])
