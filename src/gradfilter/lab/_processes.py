"""Read from the environment which processes torchrun started."""

from __future__ import annotations

import os


def started_processes() -> int:
    """Return how many processes torchrun started, 1 without it; needs no connection."""
    given = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of them
    if not all(os.environ.get(name) for name in given) or not os.environ["WORLD_SIZE"].isdigit():
        return 1
    return int(os.environ["WORLD_SIZE"])


def is_first_process() -> bool:
    """Return whether this process is the first or the only one."""
    return started_processes() == 1 or os.environ["RANK"] == "0"
