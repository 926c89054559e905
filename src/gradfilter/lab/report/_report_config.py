"""The options of ``gradfilter report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class ReportConfig:
    """Write tables and figures of the trainings in some directories on one page.

    Trainings that differ only in their seeds are one line: mean ± standard deviation. Unfinished
    trainings are marked. Parts without numbers are omitted, and the page says why. The report is
    index.html, which needs no other file, and a PNG and a CSV of every figure.
    """

    dirs: Positional[tuple[Path, ...]] = (Path("runs"),)
    """Directories with trainings, at any depth."""
    out: Path | None = None
    """Directory of the report: new, empty, or with an earlier report, which is replaced. By default
    the folder report in the first of the directories."""
