"""Metrics for TensorBoard and for Weights & Biases, beside ``metrics.jsonl``."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._config import TrainConfig

Track = Callable[[int, Mapping[str, float]], None]
"""(step, numbers by name); what is not a number is left out."""


def check_trackers(config: TrainConfig) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        UsageError: The package is missing.
    """
    for option, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if getattr(config, option) and not is_installed(package):
            raise UsageError(
                f"--{option}: the package {package!r} is not installed. Run pip install {package}."
            )


def is_installed(package: str) -> bool:
    """Whether a package could be imported."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def trackers(
    config: TrainConfig, place: Path, settings: Mapping[str, Any], first: int
) -> Iterator[Track]:
    """Everything that was asked for, as one function.

    Args:
        config: Says what is asked for.
        place: The run directory.
        settings: Shown beside the metrics.
        first: The first step that is told now.
    """
    tracks: list[Track] = []
    with ExitStack() as stack:
        if config.tensorboard:
            tracks.append(_tensorboard(place, first, stack))
        if config.wandb:
            tracks.append(_wandb(place, settings, stack))

        def track(step: int, numbers: Mapping[str, float]) -> None:
            measured = {name: value for name, value in numbers.items() if math.isfinite(value)}
            for one in tracks:
                one(step, measured)

        yield track


def _tensorboard(place: Path, first: int, stack: ExitStack) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run said after its last point is said again.
    writer = stack.enter_context(SummaryWriter(str(place / "tensorboard"), purge_step=first))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return track


def _wandb(place: Path, settings: Mapping[str, Any], stack: ExitStack) -> Track:
    import wandb

    # The same run of theirs for the same directory, also when it goes on.
    known = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="gradfilter",
        id=known,
        name=str(place),
        dir=place,
        config=dict(settings),
        resume="allow",
    )
    stack.callback(run.finish)

    def track(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return track
