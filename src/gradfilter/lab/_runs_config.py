"""The options of ``gradfilter runs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class RunsConfig:
    """List the trainings below some directories, with their state and their last evaluation.

    A directory that cannot be read is one line below the table. A killed training keeps the state
    "running": the column "changed" shows when it last wrote.
    """

    dirs: Positional[tuple[Path, ...]] = (Path("runs"),)
    """Directories with trainings, at any depth."""
    json: bool = False
    """Print JSON, with one object per directory, instead of a table."""
