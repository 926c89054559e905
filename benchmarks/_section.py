"""A section of the page: a question, what was measured to answer it, and the numbers."""

from dataclasses import dataclass
from typing import Any

from benchmarks._dots import Chart

Json = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A question, what was measured to answer it, the answer, and its numbers.

    Attributes:
        parts: Whose results these are: files to link to, and names for the command line.
    """

    title: str
    parts: tuple[str, ...]
    text: str
    table: str
    chart: Chart | None = None
    more: str = ""


def over(base: str) -> str:
    """The label of an axis."""
    return f"time over {base}: median and quartiles, logarithmic"


def is_ours(name: str) -> bool:
    """Whether a contender of that name is gradfilter's."""
    return name.startswith("gradfilter")
