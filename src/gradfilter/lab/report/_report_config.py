"""The options of ``gradfilter report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class ReportConfig:
    """Tables and figures of the trainings in some directories, on one page.

    Trainings that differ only in their seeds are one line: mean ± standard deviation. What is not
    finished is marked, and what the trainings have no numbers for is left out; the page says why.
    Writes index.html, which needs no other file, and a PNG and a CSV of every figure.
    """

    dirs: Positional[tuple[Path, ...]] = (Path("runs"),)
    """Directories with trainings, at any depth."""
    out: Path | None = None
    """A new or empty directory, or an earlier report, which is replaced; otherwise the folder
    report in the first of the directories."""
