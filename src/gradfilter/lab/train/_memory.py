"""The most memory that a training has held."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes that torch held on an accelerator at most, or this process on a CPU; -1 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return -1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
