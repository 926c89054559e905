"""Compare the measured numbers in pages and notebooks with the files that contain them.

A number is cited as a link. The fragment of the link is a path in the JSON: ``/key`` selects a
value of an object, ``/3`` an item of a list, and ``/key=value&other=value`` the only item of a list
with these values:

    [1.68](../benchmarks/results/fused_vs_looped-cpu.json#/workloads/model=mlp/results/fused/...)

    python -m benchmarks.cited docs             # list wrong numbers
    python -m benchmarks.cited --write docs     # write the values of the files into the pages
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs._results import at, locate

CITATION = re.compile(r"\[(?P<text>[^\]\[]+)\]\((?P<file>[^)#\s]+\.json)#(?P<walk>/[^)\s]+)\)")
NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*)?(?:\.\d+|(?<=\d))")

# The factors of units in a text; the files have fractions, bytes and seconds.
UNITS = {"%": 1e2, "points": 1e2, "MB": 1e-6, "GB": 1e-9, "ms": 1e3}


@dataclass(frozen=True)
class Citation:
    """A number on a page, and the value in the file."""

    page: Path
    link: str
    text: str
    value: float

    @property
    def right(self) -> str:
        """The text with the value of the file, rounded to the digits of the text."""
        shown = NUMBER.search(self.text)
        if shown is None:
            raise ValueError(
                f"{self.page}: expected a number in the text of a citation, found {self.text!r}."
            )
        digits = len(shown[0].partition(".")[2])
        value = self.value * next((by for unit, by in UNITS.items() if unit in self.text), 1)
        number = f"{value:,.{digits}f}" if "," in shown[0] else f"{value:.{digits}f}"
        number = number.removeprefix("0") if shown[0].startswith(".") else number
        return self.text[: shown.start()] + number + self.text[shown.end() :]


def citations(page: Path) -> Iterator[Citation]:
    """Yield all citations of a page; raise a KeyError if a link does not lead to a number."""
    for link in CITATION.finditer(page.read_text()):
        try:
            contents = json.loads((page.parent / link["file"]).read_text())
            value = walked(contents, link["walk"])
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise KeyError(f"{page}: {link[0]}: {error}") from None
        yield Citation(page, link[0], link["text"], value)


def walked(contents: Any, walk: str) -> float:
    """Return the number at the end of a path."""
    return float(at(contents, locate(contents, walk)))


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--write", action="store_true", help="write the values of the files into the pages"
    )
    choice = command.parse_args(arguments)
    wrong = 0
    for page in sorted([*choice.folder.rglob("*.md"), *choice.folder.rglob("*.ipynb")]):
        text = before = page.read_text()
        for cited in citations(page):
            if cited.right != cited.text:
                wrong += 1
                print(f"{page}: {cited.text}, the file says {cited.right}: {cited.link}")
                text = text.replace(cited.link, cited.link.replace(cited.text, cited.right, 1))
        if choice.write and text != before:
            page.write_text(text)
    return 1 if wrong and not choice.write else 0


if __name__ == "__main__":
    sys.exit(main())
