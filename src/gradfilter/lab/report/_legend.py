"""Give every line one colour and one dash pattern for a whole page, and draw the legend once."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradfilter.lab.report._settings import Setting, setting_name, wording

# --- Styles ---


# Okabe and Ito's colours without yellow, for all kinds of colour vision; dashes for grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SOLID: tuple[float, ...] = ()
DASHED = (3.7, 1.6)
DOTTED = (1.0, 1.65)
DASHES = (
    SOLID,
    DASHED,
    (6.4, 1.6, 1.0, 1.6),
    DOTTED,
    (6.0, 1.2),
    (3.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (1.0, 0.8),
)
"""Lengths of dashes and gaps in units of the line width; empty for a solid line."""
MARKERS = ("", "s", "^", "D")
"""Markers of matplotlib, for more lines than colours and dashes have combinations."""


@dataclass(frozen=True)
class Style:
    """The look of a line.

    Attributes:
        colour: Colour as #RRGGBB.
        dashes: Lengths of dashes and gaps in units of the line width.
        marker: Marker of matplotlib at every point; empty for none.
        box: Whether the colour alone belongs to the line, and dashes mean something else.
    """

    colour: str
    dashes: tuple[float, ...]
    marker: str = ""
    box: bool = False


def style_number(number: int, box: bool = False) -> Style:
    """Return a style: the first seven differ in colour and dashes, the first 196 in something.

    Args:
        number: Number of the style, from 0.
        box: Whether dashes mean something else.

    Examples:
        >>> style_number(0), style_number(8).colour == style_number(1).colour
        (Style(colour='#0072B2', dashes=(), marker='', box=False), True)
        >>> len({style_number(number) for number in range(196)})
        196
    """
    count = len(COLOURS)
    turn, place = divmod(number, count)
    dashes = SOLID if box else DASHES[(place + turn) % len(DASHES)]
    marker = MARKERS[turn // len(DASHES) % len(MARKERS)]
    return Style(COLOURS[place], dashes, marker, box)


# --- Lines ---


SETTINGS = "Settings"
"""Heading of the lines that are one setting each."""


@dataclass(frozen=True)
class Line:
    """A line of figures and a row of tables: a setting, or several that differ in one option.

    Attributes:
        key: Distinguishes the line from others.
        label: Short name, of the options in which settings differ.
        hover: All options that are stated or not the default.
        heading: Heading in the legend.
        box: Whether figures use the colour alone, and dashes for something else.
    """

    key: Hashable
    label: str = field(compare=False)
    hover: str = field(default="", compare=False)
    heading: str = field(default=SETTINGS, compare=False)
    box: bool = field(default=False, compare=False)


def line_of(group: Setting) -> Line:
    """Return the line of a setting."""
    seeds = " ".join(str(run.settings["seed"]) for run in group.runs)
    hover = f"{group.full_text()}; seeds: {seeds}"
    return Line(("setting", *group.settings.items(), group.finished), group.label(), hover)


def joined_line(
    groups: Sequence[Setting], name: str, *, family: str = "", label: str | None = None
) -> Line:
    """Return the line that joins settings.

    Args:
        groups: Settings that differ in one option.
        name: The option in which they differ.
        family: What models of several widths have in common; such a line owns its colour alone.
        label: Short name; by default of the other options in which settings differ.
    """
    first = groups[0]
    others = [n for n in first.settings if n != name]
    said = first.label(others) if label is None else label
    short = ", ".join(part for part in (family, "" if family and said == "plain" else said) if part)
    values = ", ".join(wording(name, group.settings[name]) for group in groups)
    what = "model width" if family else setting_name(name)
    return Line(
        (name, family, *((n, first.settings[n]) for n in others)),
        short,
        f"{first.full_text(without=(name,))}; joins {values}",
        f"Lines over {what}",
        bool(family),
    )


# --- The legend ---


class Legend:
    """The lines of a page, each with one style, in the order in which they were first drawn."""

    def __init__(self) -> None:
        """Start without lines."""
        self._styles: dict[Line, Style] = {}

    def style(self, line: Line) -> Style:
        """Return the style of a line, which is a new one if the line was not drawn before."""
        if line not in self._styles:
            self._styles[line] = style_number(len(self._styles), line.box)
        return self._styles[line]

    def drawn(self, line: Line | None) -> Style | None:
        """Return the style of a line; None if no figure shows it."""
        return None if line is None else self._styles.get(line)

    def by_heading(self) -> list[tuple[str, list[tuple[Line, Style]]]]:
        """Return the lines with their styles, by heading: settings first."""
        entries = sorted(self._styles.items(), key=lambda entry: entry[0].heading != SETTINGS)
        found: dict[str, list[tuple[Line, Style]]] = {}
        for line, style in entries:
            found.setdefault(line.heading, []).append((line, style))
        return list(found.items())


# --- The legend as a picture, for those who take a figure elsewhere ---


DPI = 150
WIDTH = 6.4
CHARACTERS = 62
ROW = 0.26
"""Height of a line of text in inches."""


def legend_picture(legend: Legend) -> bytes:
    """Draw the legend as a PNG."""
    rows: list[tuple[str, Style | None]] = []
    for heading, lines in legend.by_heading():
        rows.append((heading, None))
        rows += [(textwrap.fill(line.label, CHARACTERS), style) for line, style in lines]
    heights = [text.count("\n") + 1 for text, _ in rows]
    total = sum(heights)
    figure = Figure(figsize=(WIDTH, ROW * (total + 1)), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0, 0.96, 1))
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(total + 0.5, -0.5))
    above = itertools.accumulate(heights, initial=0)
    for (text, style), height, top in zip(rows, heights, above, strict=False):
        middle = top + height / 2
        if style is not None:
            axes.plot(
                [0.0, 0.045, 0.09],
                [middle] * 3,
                color=style.colour,
                linewidth=8 if style.box else 2.2,
                linestyle=(0, style.dashes) if style.dashes else "-",
                marker=style.marker or None,
                markevery=[1],
                markersize=5,
            )
        axes.text(
            0.0 if style is None else 0.12,
            middle,
            text,
            va="center",
            fontsize=11,
            fontweight="bold" if style is None else "normal",
            parse_math=False,  # a $ in the name of a directory does not start a formula
        )
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
