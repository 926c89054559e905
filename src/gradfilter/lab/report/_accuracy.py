"""What came out of every setting: at the end, and at equal time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradfilter.lab.report._groups import Group, finished
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
    Column("skipped", "skipped steps", 1.0): last("skipped"),
    Column("seconds", "seconds", 1.0, 2): last("seconds"),
}
NOTE = (
    "Mean ± standard deviation over seeds. Best test: the highest of all evaluations, picked with "
    "the test labels, so an upper bound and no result. Clean train: training images by their true "
    "labels. Memorised: wrong labels that the model predicts. Accepted: in the last epoch. "
    "Seconds: training steps alone."
)


def accuracy(groups: Sequence[Group]) -> Section:
    """The tables of accuracies."""
    parts = [group_table("accuracy", "At the end of the training", AT_END, groups, note=NOTE)]
    left_out = []
    equal = _at_equal_time(finished(groups))
    if equal is None:
        left_out.append("At equal time: needs two or more finished settings, and their times.")
    else:
        parts.append(equal)
    return Section("accuracy", "Accuracy", "A line per setting, over its seeds.", parts, left_out)


def _at_equal_time(groups: Sequence[Group]) -> Table | None:
    reached = [run.last("seconds") for group in groups for run in group.runs]
    if len(groups) < 2 or not all(map(math.isfinite, reached)):
        return None
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
    return group_table(
        "equal-time",
        f"At equal time: {seconds:.4g} s of training steps",
        columns,
        groups,
        note=(
            f"The last evaluation within {seconds:.4g} s, the largest time that every finished run "
            "reached; – if the first came later. Times compare only on one idle machine."
        ),
    )
