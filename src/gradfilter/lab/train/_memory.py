"""The most memory that a training has held."""

from __future__ import annotations

import math
import sys

import torch


def watch_memory(device: torch.device) -> None:
    """Begin to watch; a CPU's process has been watched from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch held on a GPU since `watch_memory`, or else the process did.

    NaN where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
