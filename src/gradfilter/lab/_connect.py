"""Connect the processes that torchrun started for one command, if there are several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gradfilter._lost_ranks import LostRanksError
from gradfilter.distributed._ranks import ALONE, Ranks
from gradfilter.lab._processes import started_processes


@contextmanager
def connected(device: torch.device) -> Iterator[Ranks]:
    """Connect the processes, if there are several.

    Args:
        device: Device of this process.
    """
    if started_processes() == 1:
        yield ALONE
        return
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    ranks = Ranks.of(None)
    try:
        yield ranks
        ranks.wait_for_all()  # no process leaves while another one still writes
    except LostRanksError as error:
        if ranks.is_first:
            raise
        sys.exit(f"gradfilter: {error}")  # without a traceback: the error is in another process
    finally:
        dist.destroy_process_group()
