"""What numbers depend on, as it is written beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import gradfilter as gf
from gradfilter.lab.stats._catalogue import METRICS
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._names import relevant
from gradfilter.lab.train._restore import Restored

OLD_AXES = ["sample", "column"]


def origin(config: StatsConfig, restored: Restored) -> dict[str, Any]:
    """Everything that the numbers depend on beside the samples themselves.

    Processes, batches and devices are not among it: they change nothing but the last digits.
    """
    trained = restored.config
    facts = {
        "command": "stats",
        "settings": relevant(config),
        "columns": list(METRICS[config.metric].columns) or [config.metric],
        "axes": axes(config),
        "data": trained.data,
        "model": trained.model,
        "label_noise": trained.label_noise,
        "seed": trained.seed,
        "checkpoint": asdict(restored.checkpoint),
        "weights": fingerprint(restored.model),
        "versions": {"gradfilter": gf.__version__, "torch": torch.__version__},
    }
    read: dict[str, Any] = json.loads(json.dumps(facts))  # as it will be read again
    return read


def axes(config: StatsConfig) -> list[str]:
    """What the nested lists of the numbers go over, from the outermost on."""
    if METRICS[config.metric].per_batch:
        return ["batch", "column"]
    if config.raw_path:
        return ["sample", "direction", "anchor"]
    return ["sample", "anchor"] if config.cumulative else ["sample"]


def modern(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version wrote as it is written now: it had a list of one number per sample."""
    return {**facts, "axes": ["sample"]} if facts.get("axes") == OLD_AXES else dict(facts)


def fingerprint(model: nn.Module) -> str:
    """Two models with the same one have the same parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
