"""Find the device that an option names, and that of one of several processes."""

from __future__ import annotations

import os

import torch

from gradfilter.lab._processes import started_processes
from gradfilter.lab._usage import check


def usable_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        UsageError: torch does not know the device, or this machine does not have it.
    """
    here = ["cpu", *_accelerators()]
    expected, fix = "a device of this machine", f"Available: {', '.join(here)}."
    try:
        device = torch.device(name)
    except RuntimeError:
        # The message of torch lists every back end that exists.
        device = None
    check(device is not None and str(device) in here, "--device", expected, repr(name), fix)
    assert device is not None
    return device


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    return [kind.type, *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process; each of several processes has its own GPU."""
    if device.type == "cpu" or started_processes() == 1:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
