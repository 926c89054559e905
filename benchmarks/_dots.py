"""Charts of the page: dots with quartiles on a logarithmic axis, and lines.

Every dot has its name and its number next to it, so that no legend is necessary. The files depend
only on the data: they contain no date and no version of the program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

OURS, OTHERS, WRONG = "#1754b8", "#707070", "#b03030"
STYLE = {
    "svg.hashsalt": "benchmarks",
    "svg.fonttype": "none",  # text as text, not as outlines of letters: half the file size
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # both have letters of the same width
    "font.size": 8,
}
WIDTH, ROW, HEAD, FOOT = 9.6, 0.2, 0.42, 0.6  # inches

Value = tuple[float, float, float]  # lower end, middle, upper end


@dataclass(frozen=True)
class Dot:
    """One line of a panel; a line without a value shows a note, or is a heading."""

    label: str
    value: Value | None
    ours: bool = False
    note: str = "none"


@dataclass(frozen=True)
class Panel:
    """Dots under one title."""

    title: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Dots:
    """Panels with a common axis, and with common labels if they are equal."""

    panels: Sequence[Panel]
    columns: int
    axis: str
    log: bool = True
    mark: float | None = 1.0  # the position of the base
    digits: str = ""  # the format of a value; empty for three digits


@dataclass(frozen=True)
class Line:
    """A line through points, with its name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Lines:
    """Panels of lines with one logarithmic axis; each panel has named marks on this axis."""

    panels: Sequence[tuple[str, Sequence[Line]]]
    axis: str
    marks: Sequence[dict[str, float]]


Chart = Dots | Lines


def short(value: float) -> str:
    """Format a ratio: 1.68, 28, 159."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def draw(chart: Chart, path: Path) -> None:
    """Write a chart; the same data give the same file."""
    with mpl.rc_context(STYLE):
        figure = _dots(chart) if isinstance(chart, Dots) else _lines(chart)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=facts)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # without pyplot, no window system is needed
    return figure


def _dots(chart: Dots) -> Figure:
    columns = min(chart.columns, len(chart.panels))
    rows = [chart.panels[i : i + columns] for i in range(0, len(chart.panels), columns)]
    heights = [ROW * max(len(panel.dots) for panel in row) + HEAD for row in rows]
    figure = _figure(sum(heights) + FOOT)
    grid = figure.subplots(
        len(rows), columns, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    ends = [end for panel in chart.panels for dot in panel.dots for end in dot.value or ()]
    for panels, line in zip(rows, grid, strict=True):
        for column, axes in enumerate(line):
            if column >= len(panels):
                axes.set_visible(False)
                continue
            labels = [dot.label for dot in panels[column].dots]
            known = column > 0 and labels == [dot.label for dot in panels[0].dots]
            _panel(axes, panels[column], chart, labelled=not known)
    first = grid[0][0]
    if chart.log:
        first.set_xscale("log")
        low, high = min([*ends, 1.0]), max([*ends, 1.0])
        span = (high / low) ** (0.2 if columns > 1 else 0.1)
        first.set_xlim(low / span**0.4, high * span)  # room for the numbers
        first.xaxis.set_major_locator(LogLocator(subs=_ticks(high / low)))
        first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        first.xaxis.set_minor_locator(NullLocator())
    else:
        room = (max(ends) - min(ends)) * 0.15
        first.set_xlim(min(ends) - room / 2, max(ends) + room)
    figure.supxlabel(chart.axis, fontsize=8)
    return figure


def _ticks(reach: float) -> tuple[float, ...]:
    """Return the digits that get a label: more of them on a shorter axis."""
    if reach < 6:
        return (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    return (1, 2, 3, 5) if reach < 20 else (1, 2, 5)


def _panel(axes: Axes, panel: Panel, chart: Dots, *, labelled: bool) -> None:
    for y, dot in enumerate(panel.dots):
        color = OURS if dot.ours else OTHERS
        if dot.value is None:
            anchor = chart.mark if chart.mark is not None else 0
            axes.annotate(dot.note, (anchor, y), (5, 0), textcoords="offset points", va="center",
                          fontsize=7, color=WRONG)  # fmt: skip
            continue
        low, middle, high = dot.value
        axes.hlines(y, low, high, color=color, linewidth=1.6, alpha=0.55)
        axes.plot(middle, y, "o" if dot.ours else "D", color=color, markersize=6 if dot.ours else 4)
        text = format(middle, chart.digits) if chart.digits else short(middle)
        axes.annotate(text, (high, y), (6, 0), textcoords="offset points", va="center", fontsize=7,
                      color=color, weight="bold" if dot.ours else "normal")  # fmt: skip
    axes.set_title(panel.title, fontsize=8.5, loc="left")
    axes.set_ylim(len(panel.dots) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.dots)), [dot.label for dot in panel.dots] if labelled else [])
    for tick, dot in zip(axes.get_yticklabels(), panel.dots, strict=False):
        tick.set_color(OURS if dot.ours else "0.2")
        tick.set_fontweight("bold" if dot.ours else "normal")
        tick.set_fontstyle("normal" if dot.value or dot.note else "italic")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True, labelsize=7)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if chart.mark is not None:
        axes.axvline(chart.mark, color="0.3", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _lines(chart: Lines) -> Figure:
    figure = _figure(3.3)
    for axes, (title, lines), marks in zip(
        figure.subplots(1, len(chart.panels), squeeze=False)[0],
        chart.panels,
        chart.marks,
        strict=True,
    ):
        for number, line in enumerate(lines):
            axes.plot(line.x, line.y, "o-", color=(OURS, "#c05a00")[number % 2], markersize=3,
                      linewidth=1.2, label=line.name)  # fmt: skip
        for name, place in marks.items():
            axes.axvline(place, color="0.4", linewidth=0.8, linestyle=":", label=name)
        axes.set_title(title, fontsize=8.5, loc="left")
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(bottom=0)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes, where it covers no line.
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.supxlabel(chart.axis, fontsize=8)
    return figure
