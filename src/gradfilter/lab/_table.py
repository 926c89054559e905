"""The table of a comparison: one line per method, mean ± sd over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gradfilter.lab._measured import Measured
from gradfilter.lab.train._evaluation import Evaluation

# Heading, and the field of the last evaluation it shows; fractions are shown as per cent.
COLUMNS = {
    "final\ntest %": "test_accuracy",
    "best test %\n(oracle)": "best",
    "clean\ntrain %": "train_clean_accuracy",
    "memorised\n%": "memorised",
    "accepted\nrows %": "accepted",
    "skipped\nsteps": "skipped",
    "seconds": "seconds",
}
COUNTS = {"skipped", "seconds"}

CAPTION = (
    "final test: the result. best test: the highest of all evaluations, picked with the test "
    "labels, so an upper bound and no result. clean train: training images by their true labels. "
    "memorised: wrong labels that the model predicts. seconds: training steps alone."
)


def comparison(measured: Sequence[Measured], labels: Mapping[str, str]) -> Table:
    """One line per method from the last evaluation of every seed, and the best of all.

    Args:
        measured: Those to be shown, in the order they were made.
        labels: What every method is, by the name that the other files call it by too.
    """
    legend = " ".join(f"{name}: {label}." for name, label in labels.items())
    table = Table(
        caption=f"{legend} {CAPTION}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run", no_wrap=True)
    for heading in COLUMNS:
        width = max(len(line) for line in heading.splitlines())
        table.add_column(heading, justify="right", min_width=width)
    for name in labels:
        by_seed: dict[int, list[Evaluation]] = {}
        for one in measured:
            if one.run == name:
                by_seed.setdefault(one.seed, []).append(one.evaluation)
        best = [max(e.test_accuracy for e in of_seed) for of_seed in by_seed.values()]
        # Evaluations are equally far apart, so that their mean is that of all steps.
        accepted = [_mean([e.accepted for e in of_seed]) for of_seed in by_seed.values()]
        last = [of_seed[-1] for of_seed in by_seed.values()]
        found = {"best": best, "accepted": accepted}
        cells = [
            _spread(found.get(key) or [getattr(e, key) for e in last], 1 if key in COUNTS else 100)
            for key in COLUMNS.values()
        ]
        table.add_row(name, *cells)
    return table


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return statistics.mean(measured) if measured else math.nan


def _spread(values: Sequence[float], factor: float) -> str:
    """``mean ± sd`` of what was measured; the sample deviation needs two values."""
    measured = [factor * v for v in values if not math.isnan(v)]
    if not measured:
        return "-"
    if len(measured) == 1:
        return f"{measured[0]}" if isinstance(measured[0], int) else f"{measured[0]:.1f}"
    return f"{statistics.mean(measured):.1f} ± {statistics.stdev(measured):.1f}"
