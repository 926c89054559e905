"""Build the sections accuracy, label noise, batch size, and sharpness-aware rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gradfilter.lab.report._curves import SAMPLES, SECONDS, draw_against
from gradfilter.lab.report._figures import Curve, PlotAxis, facets, plot
from gradfilter.lab.report._legend import Legend, Line, joined_line
from gradfilter.lab.report._parts import (
    BEST,
    PROBLEM,
    Column,
    Columns,
    Plot,
    Row,
    Section,
    Table,
    group_table,
    rank,
    table,
)
from gradfilter.lab.report._runs import RecordedRun, usual_variant
from gradfilter.lab.report._settings import (
    Setting,
    at_time,
    differing,
    finished,
    grouped_by_all_but,
    mean_and_sd,
    order,
    points,
)

# --- Results of every setting: at the end, and at equal time ---


Number = Callable[[RecordedRun], float]


def last(name: str) -> Number:
    """Return the function that reads a number of the last evaluation."""
    return lambda run: run.last(name)


def best(run: RecordedRun) -> float:
    """Return the highest test accuracy of all evaluations."""
    return float(run.metrics["test_accuracy"].max())


ORACLE = Column("best_test_accuracy", "best test % (oracle)")
AT_END: Columns = {
    Column("test_accuracy", "final test %", better="highest"): last("test_accuracy"),
    ORACLE: best,
    Column("val_accuracy", "validation %", better="highest"): last("val_accuracy"),
    Column("train_clean_accuracy", "clean train %", better="highest"): last("train_clean_accuracy"),
    Column("memorised", "memorised %", better="lowest"): last("memorised"),
    Column("accepted", "accepted rows %"): last("accepted"),
    Column("clipped_rows", "clipped rows %"): last("clipped_rows"),
    Column("skipped", "skipped steps", 1.0): last("skipped"),
    Column("seconds", "seconds", 1.0, 2): last("seconds"),
}
NOTE = (
    "Mean ± standard deviation over seeds. Best test: the highest of all evaluations, picked with "
    "the test labels, so an upper bound and no result. Clean train: training images with true "
    "labels. Memorised: wrong labels that the model predicts. Accepted and clipped: in the last "
    "epoch. Seconds: in training steps alone."
)


def accuracy(groups: Sequence[Setting], legend: Legend) -> Section:
    """Build the tables of accuracies."""
    del legend  # tables draw nothing
    parts = [group_table("accuracy", "At the end of the training", AT_END, groups, note=NOTE)]
    left_out = []
    tasks = grouped_by_all_but(finished(groups), *_settings_outside_task(groups))
    equal = [
        table
        for number, task in enumerate(tasks, 1)
        for table in _tables_at_equal_time(task, number)
    ]
    if not equal:
        left_out.append("At equal time: needs two or more finished settings, and their times.")
    parts += equal
    return Section("accuracy", "Accuracy", "One line per setting, over its seeds.", parts, left_out)


def _settings_outside_task(groups: Sequence[Setting]) -> list[str]:
    """Return settings other than the task; equal time compares one task only."""
    return [name for name in groups[0].settings if name not in ("data", "model", "device")]


def _tables_at_equal_time(groups: Sequence[Setting], number: int) -> list[Table]:
    reached = [run.last("seconds") for group in groups for run in group.runs]
    if len(groups) < 2 or not all(map(math.isfinite, reached)):
        return []
    seconds = min(reached)

    def then(name: str) -> Number:
        return lambda run: at_time(run, seconds, name)

    columns: Columns = {
        Column("test_accuracy", "test %", better="highest"): then("test_accuracy"),
        Column("val_accuracy", "validation %", better="highest"): then("val_accuracy"),
        Column("train_clean_accuracy", "clean train %", better="highest"): then(
            "train_clean_accuracy"
        ),
        Column("memorised", "memorised %", better="lowest"): then("memorised"),
        Column("samples", "samples seen", 1.0, 0): then("samples"),
        Column("seconds", "seconds of that evaluation", 1.0, 3): then("seconds"),
    }
    note = (
        f"The last evaluation within {seconds:.4g} s, the largest time that every finished run of "
        "this model reached; – if the first came later. Times compare only on one idle machine."
    )
    name = "equal-time" if number == 1 else f"equal-time-{number}"
    title = f"At equal time: {seconds:.4g} s of training steps"

    def has_trained(run: RecordedRun) -> bool:
        return at_time(run, seconds, "samples") != 0  # at 0 samples the weights are still random

    return [group_table(name, title, columns, groups, note=note, counts=has_trained)]


# --- Accuracy against the fraction of wrong labels ---


NOISE = "label_noise"


def noise(groups: Sequence[Setting], legend: Legend) -> Section:
    """Build a table with a line per rule and a column per noise, the best rule first."""
    name, title = "label-noise", "Label noise"
    lead = "Final test accuracy, by the fraction of wrong training labels."
    rules = [r for r in grouped_by_all_but(finished(groups), NOISE) if len(r) > 1]
    if not rules:
        why = "Needs finished runs that differ in --label-noise alone."
        return Section(name, title, lead, left_out=[why])
    return Section(name, title, lead, [_table(rules), *_noise_figures(rules, legend)])


def _table(rules: Sequence[Sequence[Setting]]) -> Table:
    levels = sorted({group.settings[NOISE] for rule in rules for group in rule})
    names = _names(rules)
    rows = []
    for rule in rules:
        at = {group.settings[NOISE]: group.runs for group in rule}
        diverged = [any(run.diverged for run in at.get(level, ())) for level in levels]
        values = [[run.last("test_accuracy") for run in at.get(level, ())] for level in levels]
        settings = {name: rule[0].settings[name] for name in names}
        line = joined_line(rule, NOISE)
        rows.append(
            Row(
                rule[0].label(names),
                settings,
                values,
                line=line,
                problem=tuple(rule[0].runs[0].settings[n] for n in PROBLEM if n != NOISE),
                never_best=frozenset(place for place, bad in enumerate(diverged) if bad),
            )
        )
    rows.sort(
        key=lambda row: (
            *map(order, row.problem),
            bool(row.never_best),
            *rank([mean_and_sd(values).mean for values in row.values]),
        )
    )
    within = " within each data set" if len({row.problem for row in rows}) > 1 else ""
    columns = [
        Column(f"noise_{level:g}", f"{100 * level:g} % wrong", better="highest") for level in levels
    ]
    note = f"Mean ± sd. Ordered by the mean of the columns{within}. {BEST}{within}."
    return table("label-noise", "Final test accuracy (%)", columns, rows, first="rule", note=note)


def _noise_figures(rules: Sequence[Sequence[Setting]], legend: Legend) -> list[Plot]:
    names = _names(rules)
    settings = [{name: rule[0].settings[name] for name in names} for rule in rules]
    found = []
    for facet in facets(settings):
        lines = [
            Curve(
                rules[member][0].label(facet.names),
                points(rules[member], lambda g: g.settings[NOISE], last("test_accuracy")),
                joined_line(rules[member], NOISE),
                settings[member],
            )
            for member in facet.members
        ]
        found.append(
            plot(
                f"accuracy-by-noise{facet.suffix}",
                facet.titled("Test accuracy against label noise"),
                lines,
                PlotAxis("wrong training labels (%)", NOISE, 100),
                PlotAxis("final test accuracy (%)", "test_accuracy", 100),
                legend=legend,
                points=True,
            )
        )
    return found


def _names(rules: Sequence[Sequence[Setting]]) -> list[str]:
    return [name for name in differing([rule[0] for rule in rules]) if name != NOISE]


# --- AGC and optimizers against the batch size ---


SIZE = "batch_size"
COMPARED = (SIZE, "optimizer", "agc", "agc_eps", "agc_exclude")
BATCH_LEAD = (
    "A line joins the batch sizes of one setting: after the same number of epochs, or, with "
    "--steps, after the same number of steps, that is, different numbers of samples."
)


def seconds_per_epoch(run: RecordedRun) -> float:
    """Return the time of the training steps alone, per epoch."""
    return run.last("seconds") / (run.last("epoch") or math.nan)


QUANTITIES = (
    (
        "Test accuracy",
        PlotAxis("final test accuracy (%)", "test_accuracy", 100),
        last("test_accuracy"),
    ),
    ("Test loss", PlotAxis("final test loss", "test_loss"), last("test_loss")),
    ("Time", PlotAxis("seconds per epoch", "seconds_per_epoch"), seconds_per_epoch),
)
COLUMNS: Columns = {
    Column("test_accuracy", "final test %", better="highest"): last("test_accuracy"),
    Column("test_loss", "test loss", 1.0, 3, "lowest"): last("test_loss"),
    Column("train_loss", "training loss", 1.0, 3): last("train_loss"),
    Column("clipped_units", "clipped units %"): last("clipped_units"),
    Column("seconds_per_epoch", "seconds per epoch", 1.0, 3, "lowest"): seconds_per_epoch,
}


def batches(groups: Sequence[Setting], legend: Legend) -> Section:
    """Compare trainings with and without AGC, one figure per model."""
    name, title = "batch-size", "AGC, optimizer and batch size"
    sets = [s for s in grouped_by_all_but(finished(groups), *COMPARED) if len(s) > 1]
    if not sets:
        why = "Needs finished runs that differ in --agc, --optimizer or --batch-size alone."
        return Section(name, title, BATCH_LEAD, left_out=[why])
    left_out = []
    by_model = _by_model(sets)
    stems = _short_file_names([lines[0][0].runs[0].settings["data"] for lines in by_model])
    figures = [f for lines in by_model for f in _batch_figures(lines, stems, legend)]
    if not figures:
        left_out.append("Figures against the batch size: need several batch sizes of one setting.")
    members = [group for alike in sets for group in alike]
    compared = group_table("batch-size", "Final values", COLUMNS, members, note="Mean ± sd.")
    return Section(name, title, BATCH_LEAD, [*figures, compared], left_out)


def _by_model(sets: Sequence[Sequence[Setting]]) -> list[list[list[Setting]]]:
    """Return the lines of every data set and model: groups that differ only in batch size."""
    found: dict[tuple[object, object], list[list[Setting]]] = {}
    for alike in sets:
        for line in grouped_by_all_but(alike, SIZE):
            if len(line) > 1:
                settings = line[0].runs[0].settings
                found.setdefault((settings["data"], settings["model"]), []).append(line)
    return list(found.values())


def _batch_figures(
    lines: Sequence[Sequence[Setting]], stems: Mapping[str, str], legend: Legend
) -> list[Plot]:
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
                    _joined_sizes(lines[member]),
                    {"data": data, "model": model, **settings[member]},
                )
                for member in facet.members
            ]
            name = f"batch-size-{stems[data]}-{model}-{axis.name.replace('_', '-')}"
            found.append(
                plot(
                    f"{name}{facet.suffix}",
                    facet.titled(f"{title} against batch size, {model} on {data}"),
                    curves,
                    PlotAxis("batch size", SIZE, log=2),
                    axis,
                    legend=legend,
                    points=True,
                )
            )
    return found


def _joined_sizes(groups: Sequence[Setting]) -> Line:
    others = [name for name in groups[0].settings if name != SIZE]
    return joined_line(groups, SIZE, label=_label(groups[0], others))


def _label(group: Setting, names: Sequence[str]) -> str:
    said = group.label(names)
    return "without AGC" if "agc" in names and said == "plain" else said


def _short_file_names(sets: Sequence[str]) -> dict[str, str]:
    """Return short names of data sets, for names of files.

    Examples:
        >>> _short_file_names(["folder:/a/cats", "digits", "folder:/b/dogs"])
        {'folder:/a/cats': 'folder', 'digits': 'digits', 'folder:/b/dogs': 'folder-2'}
    """
    stems: dict[str, str] = {}
    for data in dict.fromkeys(sets):
        kind = data.split(":")[0]
        number = 1 + sum(other.split(":")[0] == kind for other in stems)
        stems[data] = kind if number == 1 else f"{kind}-{number}"
    return stems


# --- SAM and GSAM compared with other settings of the same task ---


TASK = ("data", "model", "label_noise", "noise_type", "epochs", "steps", "batch_size")
SHARPNESS_LEAD = (
    "Plain and sharpness-aware trainings of the same task. A SAM step takes two gradients: also "
    "compare the seconds. The surrogate gap is f(w + e) − f(w)."
)
GAP = PlotAxis("surrogate gap", "surrogate_gap")


def _columns(groups: Sequence[Setting]) -> Columns:
    variant = usual_variant((run for g in groups for run in g.runs), "sharpness", "train")

    def measured(column: str) -> Columns:
        heading = f"{column.replace('_', ' ')} (stats)"
        return {
            Column(column, heading, 1.0, None): partial(
                RecordedRun.at_end, variant=variant, column=column
            )
        }

    return {
        Column("test_accuracy", "final test %", better="highest"): last("test_accuracy"),
        ORACLE: best,
        Column("val_accuracy", "validation %", better="highest"): last("val_accuracy"),
        Column("train_loss", "training loss", 1.0, None): last("train_loss"),
        Column("surrogate_gap", "surrogate gap", 1.0, None): last("surrogate_gap"),
        **measured("sharpness"),
        **measured("hessian_top"),
        **measured("hessian_trace"),
        Column("seconds", "seconds", 1.0): last("seconds"),
    }


def sharpness(groups: Sequence[Setting], legend: Legend) -> Section:
    """Build the table of rules, and figures of the surrogate gap over the training."""
    name, title = "sharpness", "SAM and GSAM"
    tasks = {_task(group) for group in finished(groups) if _is_sharpness_aware(group)}
    compared = [group for group in finished(groups) if _task(group) in tasks]
    if not compared:
        why = "Needs finished runs with --sam."
        return Section(name, title, SHARPNESS_LEAD, left_out=[why])
    aware = [group for group in compared if _is_sharpness_aware(group)]
    parts: list[Plot | Table] = [
        group_table("sharpness", "Sharpness-aware rules and others", _columns(compared), compared),
        *_gaps(aware, SAMPLES, "by-samples", "against samples seen", legend),
        *_gaps(aware, SECONDS, "by-seconds", "against time", legend),
    ]
    return Section(name, title, SHARPNESS_LEAD, parts)


def _gaps(
    groups: Sequence[Setting], x: PlotAxis, by: str, against: str, legend: Legend
) -> list[Plot]:
    title = "Surrogate gap"
    return draw_against(groups, GAP.name, title, GAP, x, by, against, legend=legend, said=("sam",))


def _is_sharpness_aware(group: Setting) -> bool:
    return group.runs[0].settings["sam"] is not None


def _task(group: Setting) -> tuple[object, ...]:
    return tuple(group.runs[0].settings[name] for name in TASK)
