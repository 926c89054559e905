"""Plot the curves of a comparison in one figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradfilter.lab.train._evaluation import Evaluation

# --- One evaluation of one training ---


@dataclass(frozen=True)
class Measured:
    """An evaluation of one training.

    Attributes:
        run: Name of the method.
        seed: Seed of split, noise, initial parameters and batches.
        evaluation: The evaluation; its means cover the steps since the previous one.
    """

    run: str
    seed: int
    evaluation: Evaluation


def as_metrics_line(measured: Measured) -> dict[str, Any]:
    """Return an evaluation as a line of the metrics."""
    return {"run": measured.run, "seed": measured.seed, **asdict(measured.evaluation)}


# --- The figure ---


# Okabe and Ito's colours, for all kinds of colour vision; dashes for prints in grey.
STYLES = [("#D55E00", "--"), ("#0072B2", "-."), ("#009E73", "-")]
GREY = "#595959"


def curves(measured: Sequence[Measured], labels: Mapping[str, str], title: str) -> bytes:
    """Draw a PNG of test accuracy and memorised wrong labels against the step.

    With several seeds, lines are means and bands one standard deviation to each side.

    Args:
        measured: The evaluations to show.
        labels: Label of every method, by name.
        title: Title of the figure.
    """
    # Not pyplot: it would keep the figure and choose a back end for the whole process.
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, label), (colour, dashes) in zip(labels.items(), STYLES, strict=True):
        own = [m for m in measured if m.run == name]
        for axes, field in ((left, "test_accuracy"), (right, "memorised")):
            steps, mean, sd = _by_step(own, field)
            axes.plot(steps, mean, dashes, color=colour, label=label, linewidth=2)
            axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
    _style_axes(left, "accuracy on the clean test split (%)")
    _style_axes(right, "wrong training labels memorised (%)")
    right.set_ylim(-3, 103)
    if all(math.isnan(m.evaluation.memorised) for m in measured):
        right.text(
            0.5, 0.5, "no label is wrong", ha="center", color=GREY, transform=right.transAxes
        )
    figure.suptitle(title, fontsize=11)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _by_step(measured: Sequence[Measured], field: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return steps, and mean and standard deviation over seeds at each, in per cent."""
    values: dict[int, list[float]] = {}
    for one in measured:
        value = 100 * getattr(one.evaluation, field)
        values.setdefault(one.evaluation.step, []).append(value)
    steps = sorted(values)
    mean = np.array([np.mean(values[step]) for step in steps])
    sd = np.array([np.std(v, ddof=1) if len(v := values[step]) > 1 else 0.0 for step in steps])
    return steps, mean, sd


def _style_axes(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.margins(x=0.02)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY, labelcolor=GREY)
