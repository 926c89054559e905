"""Facts about the machine and the time of a measurement."""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gradfilter

PEERS = ("gradient-agreement-filtering", "opacus", "pytorch-optimizer", "timm", "torchjd")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the facts that are necessary to interpret a number of seconds."""
    return {
        "device": device.type,
        "device_name": _name(device),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # if it is above 0 at the start, another program was running
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gradfilter": gradfilter.__version__,
        "peers": dict(_versions()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **(_cuda(device) if device.type == "cuda" else {}),
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        # The multiplication of float32: TF32 keeps 10 bits of the mantissa.
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for peer in PEERS:
        with suppress(metadata.PackageNotFoundError):
            yield peer, metadata.version(peer)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # exists only on Linux, where platform.processor() is empty
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
