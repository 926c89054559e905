"""The name of a file of numbers says everything that the numbers depend on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._catalogue import METRICS
from gradfilter.lab.stats._config import StatsConfig

LONGEST = 240
"""Bytes of a name; file systems allow 255, and what is written on the way has longer ones."""


def relevant(config: StatsConfig) -> dict[str, Any]:
    """The settings that the numbers of this metric depend on, whatever their values."""
    metric = METRICS[config.metric]
    names = ["metric", "dataset_split", "gen_strategy", *metric.takes, "restored_targets"]
    if config.gen_strategy != "none":
        names += ["num_directions", "cumulative", "raw_path"]
    if metric.draws:
        names.append("mc_sample_seed")
    return {name: getattr(config, name) for name in names}


def stem(config: StatsConfig, checkpoint: int) -> str:
    """``[OUTNAME-]METRIC-SPLIT[-STRATEGY][-SETTING...]-checkpoint-ID``.

    A setting is there if it is not the default: a switch by its name, ``target-logit-only``, a
    word by itself, ``softmax``, a number with its name, ``num-directions-4``.

    Raises:
        UsageError: It would be too long.

    Examples:
        >>> stem(StatsConfig(metric="jacobian", gen_strategy="svd-path", num_directions=4), 3)
        'jacobian-train-svd-path-num-directions-4-checkpoint-3'
    """
    defaults = {field.name: field.default for field in fields(StatsConfig)}
    parts = [config.outname] if config.outname else []
    parts += [config.metric, config.dataset_split]
    for name, value in relevant(config).items():
        if name in ("metric", "dataset_split") or value == defaults[name]:
            continue
        said = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(said)
        elif isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{said}-{value}")
    whole = "-".join([*parts, "checkpoint", str(checkpoint)])
    if len(whole.encode()) > LONGEST:
        raise UsageError(
            f"--outname: the file's name would have {len(whole.encode())} bytes, more than "
            f"{LONGEST}. Choose a shorter one."
        )
    return whole


def with_range(stem: str, start: int, stop: int, total: int) -> str:
    """``STEM``, or ``STEM-id-START-STOP`` where not all samples of the split are measured.

    Examples:
        >>> with_range("accuracy-test-checkpoint-0", 100, 200, 540)
        'accuracy-test-checkpoint-0-id-100-200'
    """
    return stem if (start, stop) == (0, total) else f"{stem}-id-{start}-{stop}"
