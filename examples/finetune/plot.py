"""Draw the results of the study.

    python examples/finetune/plot.py    # writes docs/pictures/finetune.png

Needs `pip install "gradfilter[lab]"`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"plain": "0.35", "spike": "C1", "clip": "C0", "consensus": "C3", "reference": "C2"}
TITLES = {
    "right": "Right labels, intact sequences",
    "wrong 0.4": "40 % wrong labels",
    "corrupted 0.6": "60 % corrupted sequences",
}


def curves(
    result: dict[str, Any], case: str, ax: Axes, *, what: str = "test_accuracy", timed: bool = False
) -> None:
    """Draw the mean over the seeds of every rule, over steps or over seconds.

    Args:
        result: The contents of the file of results.
        case: The case.
        ax: Where to draw.
        what: The name of the numbers.
        timed: True for seconds: steps times the time of a step.
    """
    for rule, found in result["results"][case].items():
        points = found["curves"]
        if what not in points[0]:
            continue
        scale = result["milliseconds_per_step"][rule] / 1e3 if timed else 1
        x = [point["step"] * scale for point in points]
        mean, sd = ([point[what][kind] for point in points] for kind in ("mean", "sd"))
        band = [[m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1)]
        ax.plot(x, mean, color=COLORS[rule], lw=2, label=rule)
        ax.fill_between(x, *band, color=COLORS[rule], alpha=0.12, lw=0)
    ax.set(xlabel="seconds on one core" if timed else "step", title=TITLES.get(case, case))
    ax.grid(axis="y", alpha=0.3)


def differences(result: dict[str, Any], case: str, ax: Axes) -> None:
    """Draw how many points every rule is above plain training, with 95 % intervals."""
    rules = [rule for rule in result["results"][case] if rule != "plain"]
    for place, rule in enumerate(rules):
        found = result["results"][case][rule]
        each = {0.12: (found["over_plain"], "o"), -0.12: (found["equal_time"]["over_plain"], "s")}
        for shift, (numbers, marker) in each.items():
            ax.errorbar(
                100 * numbers["mean"],
                place + shift,
                xerr=100 * numbers["half_width"],
                color=COLORS[rule],
                marker=marker,
                mfc=COLORS[rule] if marker == "o" else "w",
            )
    ax.axvline(0, color=COLORS["plain"], lw=1)
    ax.set(yticks=range(len(rules)), yticklabels=rules, ylim=(len(rules) - 0.5, -0.5))
    ax.set(xlabel="points above plain training\n(● equal steps, □ equal time)")


def figure(result: dict[str, Any]) -> Figure:
    """Return the picture of the page: accuracies over steps and time, and differences."""
    cases = [*result["results"]]
    fig, axes = plt.subplots(
        3, len(cases), figsize=(4 * len(cases), 9.5), squeeze=False, layout="constrained"
    )
    for column, case in enumerate(cases):
        curves(result, case, axes[0, column])
        curves(result, case, axes[1, column], timed=True)
        axes[1, column].set_title("")
        differences(result, case, axes[2, column])
        axes[1, column].sharey(axes[0, column])
    for row in (0, 1):
        axes[row, 0].set_ylabel("accuracy on right test texts")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path("benchmarks/results/finetune-cpu.json")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/finetune.png"))
    given = parser.parse_args(argv)
    figure(json.loads(given.results.read_text())).savefig(given.out, dpi=100)


if __name__ == "__main__":
    main()
