"""What came out of every setting: at the end, and at equal time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradfilter.lab.report._groups import Group, apart_from, finished
from gradfilter.lab.report._parts import Section, Table
from gradfilter.lab.report._runs import Run
from gradfilter.lab.report._spread import at_time
from gradfilter.lab.report._table import Column, Columns, group_table

Number = Callable[[Run], float]


def last(name: str) -> Number:
    """The number of the last evaluation."""
    return lambda run: run.last(name)


def best(run: Run) -> float:
    """The highest test accuracy of all evaluations."""
    return float(run.metrics["test_accuracy"].max())


ORACLE = Column("best_test_accuracy", "best test % (oracle)")
AT_END: Columns = {
    Column("test_accuracy", "final test %"): last("test_accuracy"),
    ORACLE: best,
    Column("val_accuracy", "validation %"): last("val_accuracy"),
    Column("train_clean_accuracy", "clean train %"): last("train_clean_accuracy"),
    Column("memorised", "memorised %"): last("memorised"),
    Column("accepted", "accepted rows %"): last("accepted"),
    Column("clipped_rows", "clipped rows %"): last("clipped_rows"),
    Column("skipped", "skipped steps", 1.0): last("skipped"),
    Column("seconds", "seconds", 1.0, 2): last("seconds"),
}
NOTE = (
    "Mean ± standard deviation over seeds. Best test: the highest of all evaluations, picked with "
    "the test labels, so an upper bound and no result. Clean train: training images by their true "
    "labels. Memorised: wrong labels that the model predicts. Accepted and clipped: in the last "
    "epoch. Seconds: training steps alone."
)


def accuracy(groups: Sequence[Group]) -> Section:
    """The tables of accuracies."""
    parts = [group_table("accuracy", "At the end of the training", AT_END, groups, note=NOTE)]
    left_out = []
    tasks = apart_from(finished(groups), *_beside_the_task(groups))
    equal = [
        table for number, task in enumerate(tasks, 1) for table in _at_equal_time(task, number)
    ]
    if not equal:
        left_out.append("At equal time: needs two or more finished settings, and their times.")
    parts += equal
    return Section("accuracy", "Accuracy", "A line per setting, over its seeds.", parts, left_out)


def _beside_the_task(groups: Sequence[Group]) -> list[str]:
    """Settings other than those of which the same time buys something else altogether."""
    return [name for name in groups[0].settings if name not in ("data", "model", "device")]


def _at_equal_time(groups: Sequence[Group], number: int) -> list[Table]:
    reached = [run.last("seconds") for group in groups for run in group.runs]
    if len(groups) < 2 or not all(map(math.isfinite, reached)):
        return []
    seconds = min(reached)

    def then(name: str) -> Number:
        return lambda run: at_time(run, seconds, name)

    columns: Columns = {
        Column("test_accuracy", "test %"): then("test_accuracy"),
        Column("val_accuracy", "validation %"): then("val_accuracy"),
        Column("train_clean_accuracy", "clean train %"): then("train_clean_accuracy"),
        Column("memorised", "memorised %"): then("memorised"),
        Column("samples", "samples seen", 1.0, 0): then("samples"),
        Column("seconds", "seconds of that evaluation", 1.0, 3): then("seconds"),
    }
    note = (
        f"The last evaluation within {seconds:.4g} s, the largest time that every finished run of "
        "this model reached; – if the first came later. Times compare only on one idle machine."
    )
    name = "equal-time" if number == 1 else f"equal-time-{number}"
    title = f"At equal time: {seconds:.4g} s of training steps"
    return [group_table(name, title, columns, groups, note=note)]
