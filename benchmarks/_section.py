"""A section of the page: a question, the measurement, and the numbers."""

from dataclasses import dataclass
from typing import Any

from benchmarks._dots import Chart

Json = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A question, the measurement, the answer, and the numbers.

    Attributes:
        parts: The parts with the results: files to link to, and names for the command line.
    """

    title: str
    parts: tuple[str, ...]
    text: str
    table: str
    chart: Chart | None = None
    more: str = ""


def over(base: str) -> str:
    """Return the label of an axis."""
    return f"time over {base}: median and quartiles, logarithmic"


def is_ours(name: str) -> bool:
    """Return whether the name of a contender is one of gradfilter."""
    return name.startswith("gradfilter")
