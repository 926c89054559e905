"""AGC and optimizers against the batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradfilter.lab.report._accuracy import last
from gradfilter.lab.report._facets import facets
from gradfilter.lab.report._figure import Axis, Curve, plot
from gradfilter.lab.report._groups import Group, apart_from, differing, finished
from gradfilter.lab.report._parts import Plot, Section
from gradfilter.lab.report._runs import Run
from gradfilter.lab.report._spread import points
from gradfilter.lab.report._table import Column, Columns, group_table

SIZE = "batch_size"
COMPARED = (SIZE, "optimizer", "agc", "agc_eps", "agc_exclude")
LEAD = (
    "A line joins the batch sizes of one setting: after as many epochs, or, where --steps was "
    "given, after as many steps, that is, different numbers of samples."
)


def seconds_per_epoch(run: Run) -> float:
    """Time of the training steps alone."""
    return run.last("seconds") / (run.last("epoch") or math.nan)


QUANTITIES = (
    ("Test accuracy", Axis("final test accuracy (%)", "test_accuracy", 100), last("test_accuracy")),
    ("Test loss", Axis("final test loss", "test_loss"), last("test_loss")),
    ("Time", Axis("seconds per epoch", "seconds_per_epoch"), seconds_per_epoch),
)
COLUMNS: Columns = {
    Column("test_accuracy", "final test %"): last("test_accuracy"),
    Column("test_loss", "test loss", 1.0, 3): last("test_loss"),
    Column("train_loss", "training loss", 1.0, 3): last("train_loss"),
    Column("clipped_units", "clipped units %"): last("clipped_units"),
    Column("seconds_per_epoch", "seconds per epoch", 1.0, 3): seconds_per_epoch,
}


def batches(groups: Sequence[Group]) -> Section:
    """With and without AGC, one figure per model."""
    name, title = "batch-size", "AGC, optimizer and batch size"
    sets = [s for s in apart_from(finished(groups), *COMPARED) if len(s) > 1]
    if not sets:
        why = "Needs finished runs that differ in --agc, --optimizer or --batch-size alone."
        return Section(name, title, LEAD, left_out=[why])
    left_out = []
    by_model = _by_model(sets)
    stems = _stems([lines[0][0].runs[0].settings["data"] for lines in by_model])
    figures = [f for lines in by_model for f in _figures(lines, stems)]
    if not figures:
        left_out.append("Figures against the batch size: need several batch sizes of one setting.")
    members = [group for alike in sets for group in alike]
    compared = group_table("batch-size", "Final values", COLUMNS, members, note="Mean ± sd.")
    return Section(name, title, LEAD, [*figures, compared], left_out)


def _by_model(sets: Sequence[Sequence[Group]]) -> list[list[list[Group]]]:
    """For every data set and model the lines: groups that differ in their batch size alone."""
    found: dict[tuple[object, object], list[list[Group]]] = {}
    for alike in sets:
        for line in apart_from(alike, SIZE):
            if len(line) > 1:
                settings = line[0].runs[0].settings
                found.setdefault((settings["data"], settings["model"]), []).append(line)
    return list(found.values())


def _figures(lines: Sequence[Sequence[Group]], stems: Mapping[str, str]) -> list[Plot]:
    run = lines[0][0].runs[0]
    data, model = run.settings["data"], run.settings["model"]
    names = [name for name in differing([line[0] for line in lines]) if name != SIZE]
    settings = [{name: line[0].settings[name] for name in names} for line in lines]
    found = []
    for facet in facets(settings):
        for title, axis, number in QUANTITIES:
            curves = [
                Curve(
                    _label(lines[member][0], facet.names),
                    points(lines[member], lambda g: g.settings[SIZE], number),
                    {"data": data, "model": model, **settings[member]},
                    place,
                )
                for place, member in enumerate(facet.members)
            ]
            name = f"batch-size-{stems[data]}-{model}-{axis.name.replace('_', '-')}"
            found.append(
                plot(
                    f"{name}{facet.suffix}",
                    facet.titled(f"{title} against batch size, {model} on {data}"),
                    curves,
                    Axis("batch size", SIZE, log=2),
                    axis,
                    points=True,
                )
            )
    return found


def _label(group: Group, names: Sequence[str]) -> str:
    said = group.label(names)
    return "without AGC" if "agc" in names and said == "plain" else said


def _stems(sets: Sequence[str]) -> dict[str, str]:
    """What data sets are called in names of files.

    Examples:
        >>> _stems(["folder:/a/cats", "digits", "folder:/b/dogs"])
        {'folder:/a/cats': 'folder', 'digits': 'digits', 'folder:/b/dogs': 'folder-2'}
    """
    stems: dict[str, str] = {}
    for data in dict.fromkeys(sets):
        kind = data.split(":")[0]
        number = 1 + sum(other.split(":")[0] == kind for other in stems)
        stems[data] = kind if number == 1 else f"{kind}-{number}"
    return stems
