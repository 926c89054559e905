"""SAM and GSAM beside what else was tried on the same task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gradfilter.lab.report._accuracy import ORACLE, best, last
from gradfilter.lab.report._curves import SAMPLES, SECONDS, over
from gradfilter.lab.report._figure import Axis
from gradfilter.lab.report._groups import Group, finished
from gradfilter.lab.report._parts import Plot, Section, Table
from gradfilter.lab.report._runs import Run, usual_variant
from gradfilter.lab.report._table import Column, Columns, group_table

TASK = ("data", "model", "label_noise", "noise_type", "epochs", "steps", "batch_size")
LEAD = (
    "Plain and sharpness-aware trainings of the same task. A SAM step takes two gradients: compare "
    "the seconds, too. The surrogate gap is f(w + e) − f(w)."
)
GAP = Axis("surrogate gap", "surrogate_gap")


def _columns(groups: Sequence[Group]) -> Columns:
    variant = usual_variant((run for g in groups for run in g.runs), "sharpness", "train")

    def measured(column: str) -> Columns:
        heading = f"{column.replace('_', ' ')} (stats)"
        return {
            Column(column, heading, 1.0, None): partial(Run.at_end, variant=variant, column=column)
        }

    return {
        Column("test_accuracy", "final test %"): last("test_accuracy"),
        ORACLE: best,
        Column("val_accuracy", "validation %"): last("val_accuracy"),
        Column("train_loss", "training loss", 1.0, None): last("train_loss"),
        Column("surrogate_gap", "surrogate gap", 1.0, None): last("surrogate_gap"),
        **measured("sharpness"),
        **measured("hessian_top"),
        **measured("hessian_trace"),
        Column("seconds", "seconds", 1.0): last("seconds"),
    }


def sharpness(groups: Sequence[Group]) -> Section:
    """The table of rules, and the surrogate gap over the training."""
    name, title = "sharpness", "SAM and GSAM"
    tasks = {_task(group) for group in finished(groups) if _is_sharpness_aware(group)}
    compared = [group for group in finished(groups) if _task(group) in tasks]
    if not compared:
        why = "Needs finished runs with --sam."
        return Section(name, title, LEAD, left_out=[why])
    aware = [group for group in compared if _is_sharpness_aware(group)]
    parts: list[Plot | Table] = [
        group_table("sharpness", "Sharpness-aware rules and others", _columns(compared), compared),
        *_gaps(aware, SAMPLES, "by-samples", "against samples seen"),
        *_gaps(aware, SECONDS, "by-seconds", "against time"),
    ]
    return Section(name, title, LEAD, parts)


def _gaps(groups: Sequence[Group], x: Axis, by: str, against: str) -> list[Plot]:
    return over(groups, GAP.name, "Surrogate gap", GAP, x, by, against, said=("sam",))


def _is_sharpness_aware(group: Group) -> bool:
    return group.runs[0].settings["sam"] is not None


def _task(group: Group) -> tuple[object, ...]:
    return tuple(group.runs[0].settings[name] for name in TASK)
