"""The three trainings of ``gradfilter demo``: presets of ``gradfilter train``."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import gradfilter as gf
from gradfilter.lab._demo_config import MICROBATCHES, DemoConfig, evaluate_every
from gradfilter.lab._options import arguments, read_settings
from gradfilter.lab._parse import parse
from gradfilter.lab._processes import started_processes
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._place import plain_settings


@dataclass(frozen=True)
class Method:
    """How the rows of a batch become one gradient.

    Attributes:
        name: Short, for files and metrics; its preset is demo-NAME.
        label: For people.
    """

    name: str
    label: str


METHODS = (
    Method("sgd", "plain SGD"),
    Method("agree", f"agreement of {MICROBATCHES} microbatches"),
    Method("consensus", "consensus of per-sample gradients"),
)
LABELS = {method.name: method.label for method in METHODS}


def train_config(method: Method, config: DemoConfig, seed: int) -> TrainConfig:
    """What this training is, as ``gradfilter train --preset demo-NAME`` would have it."""
    settings = read_settings(f"demo-{method.name}", None, "train")
    preset = parse(TrainConfig, "gradfilter demo", arguments(settings))
    return replace(
        preset,
        agree=None if preset.agree is None else config.threshold,
        label_noise=config.noise,
        steps=config.steps,
        seed=seed,
        data_split_seed=seed,
        label_seed=seed,
        device=config.device,
        dtype=config.dtype,
        workers=0,
    )


def settings(config: DemoConfig) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "command": "demo",
        **asdict(config),
        "out": None if config.out is None else str(config.out),
        "runs": {
            method.name: plain_settings(train_config(method, config, config.seed))
            for method in METHODS
        },
        "evaluate_every": evaluate_every(config.steps),
        "threads": torch.get_num_threads(),
        "processes": started_processes(),
        "versions": {
            "gradfilter": gf.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
