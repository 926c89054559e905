"""The tables of measurements, and of the runs themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from gradfilter.lab._reading import printable
from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._measures import Measure
from gradfilter.lab.report._parts import Section, Table
from gradfilter.lab.report._spread import spread
from gradfilter.lab.report._table import Column, Row, table
from gradfilter.lab.train._evaluations import NUMBERS

NUMBERS_OF = {
    "mean": "mean",
    "lipschitz": "√(mean σ²)",
    "right": "at right labels",
    "wrong": "at wrong labels",
}


def measurements(groups: Sequence[Group]) -> Section:
    """What ``gradfilter stats`` found, at the last checkpoint that it measured."""
    name, title = "measurements", "Measurements of checkpoints"
    lead = (
        "What gradfilter stats found at the last step that was measured in every run of a setting; "
        "where they ended at different ones, at their ends."
    )
    rows, left_out = [], []
    for group in groups:
        found, why = _rows(group)
        rows += found
        left_out += why
    rows.sort(key=lambda row: (row.settings["variant"], row.settings["column"]))  # groups in order
    if not rows:
        left_out = left_out or ["Needs gradfilter stats on some of these runs."]
        return Section(name, title, lead, left_out=left_out)
    columns = [
        Column("checkpoint_step", "step", 1.0, 0),
        Column("samples", "samples", 1.0, 0),
        *(Column(number, heading, 1.0, None) for number, heading in NUMBERS_OF.items()),
    ]
    note = "Mean ± sd over seeds, of the mean over samples."
    return Section(
        name,
        title,
        lead,
        [table("measurements", "Per metric and setting", columns, rows, note=note)],
        left_out,
    )


def _rows(group: Group) -> tuple[list[Row], list[str]]:
    """A row per way of measuring, and which have none."""
    by_way: dict[tuple[str, str], dict[int, dict[int, Measure]]] = {}
    for number, run in enumerate(group.runs):
        for measure in run.measures:
            of_runs = by_way.setdefault((measure.variant, measure.column), {})
            of_runs.setdefault(number, {})[measure.step] = measure
    found, left_out = [], []
    for (variant, column), of_runs in by_way.items():
        measures = _comparable(group, of_runs)
        metric = next(iter(next(iter(of_runs.values())).values())).metric
        what = variant if column == metric else f"{variant}, {column.replace('_', ' ')}"
        label = f"{what}: {group.label()}"
        if not measures:
            left_out.append(f"{label}: no step was measured in all of its runs.")
            continue
        settings = {"metric": metric, "column": column, "variant": variant, **group.settings}
        values = [[getattr(m, n) for m in measures] for n in ("step", "samples", *NUMBERS_OF)]
        found.append(Row(label, settings, values, len(measures)))
    return found, left_out


def _comparable(group: Group, of_runs: dict[int, dict[int, Measure]]) -> list[Measure]:
    """Of every run that was measured, where they stood alike: one step, or their ends."""
    common = set.intersection(*(set(by_step) for by_step in of_runs.values()))
    if common:
        return [by_step[max(common)] for by_step in of_runs.values()]
    ends = [by_step.get(int(group.runs[n].last("step"))) for n, by_step in of_runs.items()]
    return [end for end in ends if end is not None] if all(ends) else []


def overview(groups: Sequence[Group]) -> Section:
    """Every run, its state and where it is."""
    rows, numbers = [], []
    for group in groups:
        for run in group.runs:
            facts = {
                "run": printable(run.path),
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
