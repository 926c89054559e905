"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Plot:
    """A figure, and the numbers in it.

    Attributes:
        name: Of the files, without their endings.
        title: Above it.
        note: Below it, for what the title does not say.
        alt: What it shows, for those who cannot see it.
        png: The image.
        size: Its width and height in pixels.
        data: All that was drawn, in full precision.
    """

    name: str
    title: str
    note: str
    alt: str
    png: bytes
    size: tuple[int, int]
    data: pd.DataFrame


@dataclass(frozen=True)
class Table:
    """A table, and the numbers in it.

    Attributes:
        name: Of the file, without its ending.
        title: Above it.
        note: Below it.
        headings: One per column; the first is that of the settings.
        rows: As they are shown.
        data: The same in full precision.
    """

    name: str
    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: pd.DataFrame


@dataclass(frozen=True)
class Section:
    """Figures and tables about one question.

    Attributes:
        name: For links within the page.
        title: Its heading.
        lead: What it is about.
        parts: Nothing if it is left out.
        left_out: What is not shown, and why.
    """

    name: str
    title: str
    lead: str
    parts: Sequence[Plot | Table] = ()
    left_out: Sequence[str] = ()
