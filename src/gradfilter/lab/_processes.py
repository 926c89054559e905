"""What torchrun tells a process about the others it started."""

from __future__ import annotations

import os


def started_processes() -> int:
    """How many processes torchrun started, 1 without it; known before they are connected."""
    given = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # one alone is something else
    if not all(os.environ.get(name) for name in given) or not os.environ["WORLD_SIZE"].isdigit():
        return 1
    return int(os.environ["WORLD_SIZE"])


def is_first_process() -> bool:
    """Whether this is the first of them, or alone."""
    return started_processes() == 1 or os.environ["RANK"] == "0"
