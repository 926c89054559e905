"""Draw figures of curves with bands, split into several if one would be unreadable."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

from gradfilter.lab._plot import GREY
from gradfilter.lab.report._legend import COLOURS, DPI, WIDTH, Legend, Line, Style
from gradfilter.lab.report._parts import Plot
from gradfilter.lab.report._settings import Setting, mean_and_sd, order, wording

# --- Choose curves if there are too many ---


MOST_SETTINGS = 42
"""Largest number of settings with curves; tables have all settings."""


def shortlist(
    groups: Sequence[Setting], most: int = MOST_SETTINGS
) -> tuple[Sequence[Setting], list[str]]:
    """Choose the settings whose curves are drawn; also return a line about the others.

    Choose those with the highest validation accuracy, or the first ones if it was not measured
    everywhere: a choice by test accuracy would not be fair.
    """
    if len(groups) <= most:
        return groups, []
    validation = [mean_and_sd(run.last("val_accuracy") for run in g.runs).mean for g in groups]
    places = list(range(len(groups)))
    if measured := not any(map(math.isnan, validation)):
        places.sort(key=lambda place: -validation[place])
    why = "the highest validation accuracy" if measured else "the first places in the table"
    kept = [groups[place] for place in sorted(places[:most])]
    return kept, [
        f"Not drawn: {len(groups) - most} more settings; drawn are the {most} with {why}."
    ]


# --- One figure ---


MOST = len(COLOURS)
"""Largest number of curves that can be distinguished in one figure."""
HEIGHT = 4.2
MOST_TICKS = 12
LARGEST = 1e100
"""Largest number that is drawn."""


@dataclass(frozen=True)
class Curve:
    """A line with a band.

    Attributes:
        label: Name in the CSV and in the text for screen readers.
        data: Columns x, mean, sd and runs.
        line: The line of the legend.
        settings: Settings of the runs, for the CSV.
        dashes: Dashes with a meaning of their own, instead of those of the line.
        runs: Number of runs, if it is known.
    """

    label: str
    data: pd.DataFrame
    line: Line
    settings: Mapping[str, Any] = field(default_factory=dict)
    dashes: tuple[float, ...] | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Mark:
    """A marked position on the x axis.

    Attributes:
        place: Position in the units of the data.
        line: The line of the legend whose colour the mark has.
    """

    place: float
    line: Line


@dataclass(frozen=True)
class PlotAxis:
    """An axis of a figure.

    Attributes:
        label: Label with the unit.
        factor: Converts the numbers to the unit: 100 for per cent.
        log: Base of a logarithmic axis, or None.
        name: Name of the numbers in the CSV.
    """

    label: str
    name: str
    factor: float = 1.0
    log: int | None = None


def plot(
    name: str,
    title: str,
    curves: Sequence[Curve],
    x: PlotAxis,
    y: PlotAxis,
    *,
    legend: Legend,
    note: str = "",
    marks: Mapping[str, Mark] | None = None,
    points: bool = False,
    focus: bool = False,
) -> Plot:
    """Draw curves without a legend, which the page has once; keep their numbers.

    Args:
        name: Name of the files, without suffix.
        title: Title above the figure.
        curves: The curves; those without numbers are omitted.
        x: Horizontal axis.
        y: Vertical axis.
        legend: The lines of the page, which state the style of every curve.
        note: Text below the figure.
        marks: Positions to mark by a vertical line, by label.
        points: Mark the measured points, for curves with few of them.
        focus: Ignore the first tenth of the curves for the range of the y axis.
    """
    shown = [curve for curve in curves if len(curve.data)]
    # Not pyplot: it would keep the figure and choose a back end for the whole process.
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _style_axes(axes, x, y)
    drawn = [replace(curve, data=_drawable(curve.data)) for curve in shown]
    for curve in drawn:
        _draw(axes, curve, legend.style(curve.line), x, y, points)
    if focus and drawn:
        _focus(axes, drawn, y)
    for mark in (marks or {}).values():
        colour = legend.style(mark.line).colour
        axes.axvline(x.factor * mark.place, color=colour, linestyle=":", linewidth=1.8)
    if x.log == 2:
        _ticks_at(axes, sorted({x.factor * v for c in drawn for v in c.data["x"].dropna()}))
    fewer = [c.label for c in shown if c.runs is not None and (c.data["runs"] < c.runs).any()]
    if fewer:
        note = f"{note} Only some runs have this number: {'; '.join(fewer)}.".strip()
    if marks:
        places = [f"{label} at {x.factor * mark.place:g}" for label, mark in marks.items()]
        note = f"{note} Vertical line: {'; '.join(places)}.".strip()
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return Plot(
        name,
        title,
        note,
        _alt(title, shown, x, y, marks or {}),
        image.getvalue(),
        (round(WIDTH * DPI), round(HEIGHT * DPI)),
        _numbers(shown, x, y),
    )


def _drawable(data: pd.DataFrame) -> pd.DataFrame:
    """Drop numbers that are too large for an axis, whose range would not be finite."""
    columns = ["x", "mean", "sd"]
    return data.assign(**{name: data[name].where(data[name].abs() <= LARGEST) for name in columns})


def _draw(axes: Axes, curve: Curve, style: Style, x: PlotAxis, y: PlotAxis, points: bool) -> None:
    dashes = style.dashes if curve.dashes is None else curve.dashes
    places, mean = x.factor * curve.data["x"], y.factor * curve.data["mean"]
    axes.plot(
        places,
        mean,
        linestyle=(0, dashes) if dashes else "-",
        color=style.colour,
        linewidth=2.2,
        marker=style.marker or ("o" if points or len(places) == 1 else None),
        markersize=5,
    )
    sd = y.factor * curve.data["sd"]
    if sd.notna().any():
        # A logarithmic axis has no numbers below 0.
        low = mean - sd if y.log is None else np.maximum(mean - sd, mean / 1e3)
        axes.fill_between(places, low, mean + sd, color=style.colour, alpha=0.18, linewidth=0)


def _focus(axes: Axes, curves: Sequence[Curve], y: PlotAxis) -> None:
    everything = pd.concat([curve.data for curve in curves])
    first, last = everything["x"].min(), everything["x"].max()
    late = everything[everything["x"] >= first + (last - first) / 10]
    sd = late["sd"].fillna(0)
    high = y.factor * (late["mean"] + sd).max()
    if y.log is not None:  # a band down to 0 would have an infinite range
        low = y.factor * late["mean"][late["mean"] > 0].min()
        if low < high:
            axes.set_ylim(low / 2, high * 1.5)
    elif (low := y.factor * (late["mean"] - sd).min()) < high:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _style_axes(axes: Axes, x: PlotAxis, y: PlotAxis) -> None:
    axes.set_xlabel(x.label, fontsize=13)
    axes.set_ylabel(y.label, fontsize=13)
    if x.log is not None:
        axes.set_xscale("log", base=x.log)
    if y.log is not None:
        axes.set_yscale("log", base=y.log)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if x.log == 10:
        axes.xaxis.set_major_locator(LogLocator(10))
    axes.margins(x=0.03)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY, labelcolor="#333333", labelsize=12)


def _ticks_at(axes: Axes, places: Sequence[float]) -> None:
    if len(places) > MOST_TICKS:  # too many to read: use powers of two
        places = [place for place in places if place > 0 and math.log2(place).is_integer()]
    axes.set_xticks(places)
    axes.xaxis.set_minor_locator(NullLocator())
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axes.xaxis.set_major_formatter(plain)
    if len(places) > 8:
        axes.tick_params(axis="x", labelrotation=45)


def _numbers(curves: Sequence[Curve], x: PlotAxis, y: PlotAxis) -> pd.DataFrame:
    parts = []
    for curve in curves:
        data = curve.data.rename(
            columns={"x": x.name, "mean": f"{y.name}_mean", "sd": f"{y.name}_sd"}
        )
        own = {"line": curve.label, **curve.settings}
        parts.append(pd.DataFrame({n: [v] * len(data) for n, v in own.items()}).join(data))
    return pd.concat(parts, ignore_index=True)


def _alt(
    title: str, curves: Sequence[Curve], x: PlotAxis, y: PlotAxis, marks: Mapping[str, Mark]
) -> str:
    ends = [
        f"{curve.label}: {y.factor * curve.data['mean'].iloc[-1]:.4g}"
        f" at {x.factor * curve.data['x'].iloc[-1]:.4g}"
        for curve in curves
    ]
    marked = "".join(f" {label}: {x.factor * mark.place:g}." for label, mark in marks.items())
    return f"{title}: {y.label} against {x.label}. Where the lines end: {'; '.join(ends)}.{marked}"


# --- Several figures ---


Settings = Mapping[str, Any]
FEW = 2
"""Largest number of curves that share a figure with those of the next value."""


@dataclass(frozen=True)
class Facet:
    """The curves of one figure.

    Attributes:
        common: Settings that only these curves share.
        place: ``(2 of 3)`` if there are several figures.
        suffix: Suffix of the file name.
        members: Indices of the curves in the whole sequence.
        names: Names of the settings in which the curves differ.
    """

    common: str
    place: str
    suffix: str
    members: tuple[int, ...]
    names: tuple[str, ...]

    def titled(self, title: str) -> str:
        """Return the title of the figure, with its number if there are several."""
        named = ": ".join(part for part in (title, self.common) if part)
        return f"{named} {self.place}".strip()


def facets(settings: Sequence[Settings], most: int = MOST) -> list[Facet]:
    """Split curves into figures of at most `most`, by the first setting that divides them.

    Args:
        settings: Settings of every curve; all have the same names.
        most: Largest number of curves in one figure.

    Examples:
        >>> many = [{"model": f"mlp_{w}", "agc": a} for w in (8, 16) for a in (None, 0.1)]
        >>> [(facet.titled("Loss"), facet.members) for facet in facets(many, most=3)]
        [('Loss: mlp_8 (1 of 2)', (0, 1)), ('Loss: mlp_16 (2 of 2)', (2, 3))]
    """
    if not settings:
        return []
    names = list(settings[0])
    parts = _split_members(settings, list(range(len(settings))), names, most)
    found = []
    for number, part in enumerate(parts, 1):
        own = [n for n in names if len({settings[i][n] for i in part}) > 1]
        common = [n for n in names if n not in own and len({s[n] for s in settings}) > 1]
        said = ", ".join(w for n in common if (w := wording(n, settings[part[0]][n])))
        place = f"({number} of {len(parts)})" if len(parts) > 1 else ""
        suffix = f"-{number}" if place else ""
        found.append(Facet(said, place, suffix, tuple(part), tuple(own)))
    return found


def _split_members(
    settings: Sequence[Settings], members: list[int], names: Sequence[str], most: int
) -> list[list[int]]:
    if len(members) <= most:
        return [members]
    name = next((n for n in names if len({settings[i][n] for i in members}) > 1), None)
    if name is None:
        return [members[i : i + most] for i in range(0, len(members), most)]
    values = sorted({settings[i][name] for i in members}, key=order)
    parts: list[list[int]] = []
    room = 0  # free places in the last part; a value is never split
    for value in values:
        of_value = [i for i in members if settings[i][name] == value]
        if len(of_value) <= min(FEW, room):
            parts[-1] += of_value
            room -= len(of_value)
        else:
            parts += _split_members(settings, of_value, names, most)
            room = most - len(of_value) if len(of_value) <= FEW else 0
    return parts
