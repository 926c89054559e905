"""How much memory may be held between questions."""

from __future__ import annotations

import math
import os

import torch


def check_budget(budget: int | float) -> None:
    """Refuse what is neither a number of bytes nor a fraction of the device's memory."""
    fraction = isinstance(budget, float)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not 0 <= budget <= (1 if fraction else math.inf):  # nan is in no range
        raise ValueError(
            "Expected memory_budget as bytes (int >= 0) or as a fraction of the device's memory "
            f"(float from 0 to 1), found {budget!r}. Write 10**9 for a gigabyte; the "
            "default is 0.25."
        )


def bytes_of(budget: int | float, device: torch.device) -> int:
    """A budget in bytes."""
    if not isinstance(budget, float):
        return budget
    if device.type == "cuda":
        return int(budget * torch.cuda.get_device_properties(device).total_memory)
    return int(budget * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
