"""Build the sections measurements of checkpoints, runs, and double descent over widths."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from gradfilter.lab._run_files import printable
from gradfilter.lab.report._figures import MOST, Curve, Mark, PlotAxis, facets, plot
from gradfilter.lab.report._legend import DASHED, DOTTED, SOLID, Legend, joined_line, line_of
from gradfilter.lab.report._parts import (
    Column,
    Plot,
    Row,
    Section,
    Table,
    TableRow,
    rank,
    table,
)
from gradfilter.lab.report._runs import Measure, RecordedRun, usual_variant
from gradfilter.lab.report._settings import (
    Setting,
    finished,
    grouped_by_all_but,
    mean_and_sd,
    points,
)
from gradfilter.lab.train._evaluation import NUMBERS

# --- Tables of measurements, and of the runs themselves ---


NUMBERS_OF = {
    "mean": "mean",
    "lipschitz": "√(mean σ²)",
    "right": "at right labels",
    "wrong": "at wrong labels",
}


def measurements(groups: Sequence[Setting], legend: Legend) -> Section:
    """List what ``gradfilter stats`` found at the last checkpoint that it measured."""
    del legend  # tables draw nothing
    name, title = "measurements", "Measurements of checkpoints"
    lead = (
        "Results of gradfilter stats at the last step that was measured in every run of a setting; "
        "at the ends of the runs if these differ."
    )
    rows, left_out = [], []
    for group in groups:
        found, why = _rows(group)
        rows += found
        left_out += why
    mean = 2 + list(NUMBERS_OF).index("mean")  # after the step and the number of samples
    rows.sort(
        key=lambda row: (row.settings["variant"], row.settings["column"], rank(row.values[mean]))
    )
    if not rows:
        left_out = left_out or ["Needs gradfilter stats on some of these runs."]
        return Section(name, title, lead, left_out=left_out)
    columns = [
        Column("checkpoint_step", "step", 1.0, 0),
        Column("samples", "samples", 1.0, 0),
        *(Column(number, heading, 1.0, None) for number, heading in NUMBERS_OF.items()),
    ]
    note = "Mean ± sd over seeds, of the mean over samples. Ordered by metric, then by the mean."
    return Section(
        name,
        title,
        lead,
        [table("measurements", "Per metric and setting", columns, rows, note=note)],
        left_out,
    )


def _rows(group: Setting) -> tuple[list[Row], list[str]]:
    """Return a row per variant of a measurement, and the variants without one."""
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
        found.append(Row(label, settings, values, len(measures), line_of(group)))
    return found, left_out


def _comparable(group: Setting, of_runs: dict[int, dict[int, Measure]]) -> list[Measure]:
    """Return one measurement per run, all at one step, or all at the ends of the runs."""
    common = set.intersection(*(set(by_step) for by_step in of_runs.values()))
    if common:
        return [by_step[max(common)] for by_step in of_runs.values()]
    ends = [by_step.get(int(group.runs[n].last("step"))) for n, by_step in of_runs.items()]
    return [end for end in ends if end is not None] if all(ends) else []


def overview(groups: Sequence[Setting], legend: Legend) -> Section:
    """List every run, with its state and directory."""
    del legend  # tables draw nothing
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
            cells = [
                facts["setting"],
                str(facts["seed"]),
                run.status,
                "–" if math.isnan(run.parameters) else f"{run.parameters:.0f}",
                f"{run.last('step'):.0f}",
                f"{run.last('epoch'):.4g}",
                mean_and_sd([run.last("seconds")]).shown(),
                facts["run"],
            ]
            rows.append(TableRow(cells, line_of(group)))
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
    return Section("runs", "Runs", "The runs on this page.", [listed])


# --- Double descent: error and Lipschitz constant against the width of one family of models ---


FEWEST = 3
"""Smallest number of widths for a curve."""
SPLITS = {"train": DASHED, "test": SOLID, "val": DOTTED}
"""Dashes of the figures by split; their colours are those of the families."""
DASH_NAMES = {DASHED: "Dashed", SOLID: "Solid", DOTTED: "Dotted"}
LEAD = (
    "The interpolation threshold is the first width whose training error, against the labels "
    "trained on, is 0 in every run."
)


@dataclass(frozen=True)
class WidthFamily:
    """Models of one kind in several widths, the same in all other settings.

    Attributes:
        name: Name of the models without the width.
        groups: Groups in the order of the widths.
    """

    name: str
    groups: tuple[Setting, ...]

    @property
    def threshold(self) -> Setting | None:
        """Return the first width that fits all of its training labels."""
        fits = (g for g in self.groups if all(r.last("train_accuracy") == 1 for r in g.runs))
        return next(fits, None)


def widths(groups: Sequence[Setting], legend: Legend) -> Section:
    """Draw errors, Lipschitz constants and Jacobians against width and parameters."""
    title, parts, left_out = "Width and double descent", [], []
    by_name: dict[str, list[WidthFamily]] = {}
    for family in families(finished(groups)):
        by_name.setdefault(family.name, []).append(family)
    if not by_name:
        left_out.append(
            f"Needs finished runs of one model in {FEWEST} or more widths (mlp_H, cnn_K, "
            "resnet18_K), the same in all other settings."
        )
    for name, members in by_name.items():
        for quantity in (_errors, _lipschitz, _jacobians):
            drawn = [p for x in (_width, _parameters) for p in quantity(name, members, x, legend)]
            parts += drawn
            if not drawn:
                left_out.append(f"{name}: {_MISSING[quantity]}")
    return Section("width", title, LEAD, parts, left_out)


def families(groups: Sequence[Setting]) -> Iterator[WidthFamily]:
    """Find families of models with at least `FEWEST` widths."""
    for alike in grouped_by_all_but(groups, "model"):
        by_name: dict[str, list[Setting]] = {}
        for group in alike:
            if name := family_and_width(group.runs[0].settings["model"])[0]:
                by_name.setdefault(name, []).append(group)
        for name, members in by_name.items():
            if len(members) >= FEWEST:
                yield WidthFamily(name, tuple(sorted(members, key=_width)))


def family_and_width(model: str) -> tuple[str, int]:
    """Split the name of a model into family and width; an empty name if it has no width.

    Examples:
        >>> family_and_width("resnet18_16"), family_and_width("vgg11")
        (('resnet18', 16), ('', 0))
    """
    found = re.fullmatch(r"(\w+)_(\d+)", model)
    return (found[1], int(found[2])) if found else ("", 0)


def _width(group: Setting) -> float:
    return family_and_width(group.runs[0].settings["model"])[1]


def _parameters(group: Setting) -> float:
    return group.runs[0].parameters


Place = Callable[[Setting], float]
SplitLine = tuple[str, Callable[[RecordedRun], float], tuple[float, ...]]
"""A label, the number to draw, and its dashes."""


def _errors(name: str, members: Sequence[WidthFamily], place: Place, legend: Legend) -> list[Plot]:
    lines: list[SplitLine] = [
        (f"{split} error", _error(split), SPLITS[split]) for split in ("test", "train")
    ]
    axis = PlotAxis("error (%)", "error", 100)
    return _figures(name, members, place, lines, "error", axis, legend)


def _error(split: str) -> Callable[[RecordedRun], float]:
    return lambda run: 1 - run.last(f"{split}_accuracy")


def _lipschitz(
    name: str, members: Sequence[WidthFamily], place: Place, legend: Legend
) -> list[Plot]:
    lines = _measured(members, "jacobian_operator_norm", "lipschitz")
    axis = PlotAxis("√(mean σ²) of input Jacobians", "lipschitz")
    return _figures(name, members, place, lines, "empirical Lipschitz constant", axis, legend)


def _jacobians(
    name: str, members: Sequence[WidthFamily], place: Place, legend: Legend
) -> list[Plot]:
    axis = PlotAxis("mean Frobenius norm", "jacobian")
    lines = _measured(members, "jacobian", "mean")
    return _figures(name, members, place, lines, "input Jacobian", axis, legend)


def _measured(members: Sequence[WidthFamily], metric: str, number: str) -> list[SplitLine]:
    runs = [run for family in members for group in family.groups for run in group.runs]
    ways = {split: usual_variant(runs, metric, split) for split in SPLITS}
    return [
        (f"{split} images", partial(RecordedRun.at_end, variant=ways[split], number=number), dashes)
        for split, dashes in SPLITS.items()
    ]


_MISSING = {
    _errors: "no error was measured.",
    _lipschitz: "empirical Lipschitz constant: needs gradfilter stats --metric "
    "jacobian_operator_norm --last on these runs.",
    _jacobians: "input Jacobian: needs gradfilter stats --metric jacobian --last on these runs.",
}


def _figures(
    name: str,
    members: Sequence[WidthFamily],
    place: Place,
    lines: Sequence[SplitLine],
    what: str,
    y: PlotAxis,
    legend: Legend,
) -> list[Plot]:
    settings = [{n: v for n, v in f.groups[0].settings.items() if n != "model"} for f in members]
    by = "width" if place is _width else "parameters"
    found = []
    for facet in facets(settings, most=MOST // 2):
        drawn: list[Curve] = []
        marks: dict[str, Mark] = {}
        never = []
        meanings: dict[str, tuple[float, ...]] = {}
        for member in facet.members:
            family = members[member]
            setting = family.groups[0].label(facet.names) if facet.names else ""
            line = joined_line(family.groups, "model", family=f"{name}_K")
            for called, number, dashes in lines:
                data = points(family.groups, place, number)
                if len(data) > 1:
                    label = _joined(called, setting)
                    drawn.append(Curve(label, data, line, settings[member], dashes))
                    meanings[called] = dashes
            mark = _joined("interpolation threshold", setting)
            if family.threshold is None:
                never.append(mark)
            elif math.isfinite(at := place(family.threshold)):
                marks[mark] = Mark(at, line)
        if drawn:
            found.append(
                plot(
                    f"{by}-{name}-{y.name}{facet.suffix}",
                    facet.titled(f"{name}: {what} against {by}"),
                    drawn,
                    PlotAxis(by, by, log=_base(by, drawn)),
                    y,
                    legend=legend,
                    note=_note(meanings, never),
                    marks=marks,
                    points=True,
                )
            )
    return found


def _note(meanings: Mapping[str, tuple[float, ...]], never: Sequence[str]) -> str:
    """Say what the dashes mean, and which families never fit their labels."""
    said = [f"{DASH_NAMES[dashes]}: {called}." for called, dashes in meanings.items()]
    return " ".join([*said, *(f"No width reaches the {mark}." for mark in never)])


def _base(by: str, curves: Sequence[Curve]) -> int | None:
    places = [x for curve in curves for x in curve.data["x"]]
    if max(places) < 8 * min(places):
        return None
    return 2 if by == "width" else 10


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
