"""What ``gradfilter demo`` can be told, what it refuses, and what it records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import named_directory, numbered_directory
from gradfilter.lab._usage import check, usable_device

EVALUATIONS = 40
MICROBATCHES = 8


@dataclass(frozen=True)
class DemoConfig:
    """Train one network in three ways on digits with wrong labels, side by side.

    Plain SGD, microbatches that have to agree, and a consensus of per-sample gradients start from
    the same parameters and see the same batches. Prints a table and writes metrics, settings, a
    checkpoint of each run and a plot. Nothing is tuned on the test split. In 2, 4 or 8 processes
    (torchrun --nproc-per-node 2 -m gradfilter demo) each takes its part of every batch, and the
    training is the same.
    """

    noise: float = 0.3
    """Fraction of the training labels that are wrong, in [0, 1)."""
    threshold: float = 0.9
    """Largest cosine distance at which microbatches agree, in [0, 2]."""
    steps: int = 800
    """Steps of each training, of 80 samples each."""
    seed: int = 0
    """Seed of the split, the noise, the initial parameters and the batches."""
    seeds: int = 1
    """How many seeds, from --seed on; two or more give mean ± standard deviation."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps, ...; each of several processes on its own."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters and images."""
    out: Path | None = None
    """A new or empty directory for the results; otherwise one is made in runs/."""


def checked(config: DemoConfig) -> torch.device:
    """The device to train on.

    Raises:
        UsageError: A value is out of range.
    """
    check(
        0 <= config.noise < 1,
        "--noise",
        "a fraction in [0, 1)",
        config.noise,
        "0.3 makes 30 % of the training labels wrong.",
    )
    check(
        0 <= config.threshold <= 2,
        "--threshold",
        "a cosine distance in [0, 2]",
        config.threshold,
        "0.9 is the default, 2 accepts everything.",
    )
    check(config.steps >= 1, "--steps", "at least 1", config.steps, "800 is the default.")
    check(config.seed >= 0, "--seed", "at least 0", config.seed, "0 is the default.")
    check(
        MICROBATCHES % started_processes() == 0,
        "torchrun",
        f"1, 2, 4 or {MICROBATCHES} processes, for {MICROBATCHES} microbatches",
        started_processes(),
        "Choose another --nproc-per-node.",
    )
    check(config.seeds >= 1, "--seeds", "at least 1", config.seeds, "5 gives mean ± sd.")
    return usable_device(config.device)


def directory(config: DemoConfig) -> Path:
    """Make the directory for the results.

    Raises:
        UsageError: It cannot be written to, or results would be mixed with what is there.
    """
    if config.out is not None:
        return named_directory(config.out)
    many = f"-seeds-{config.seeds}" if config.seeds > 1 else ""
    return numbered_directory(
        Path("runs")
        / f"demo-noise-{config.noise:g}-threshold-{config.threshold:g}-steps-{config.steps}"
        f"-{config.device.replace(':', '')}-seed-{config.seed}{many}"
    )


def evaluate_every(steps: int) -> int:
    """Steps from one evaluation to the next."""
    return max(1, steps // EVALUATIONS)
