"""Define and check the options of ``gradfilter demo``, and make its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gradfilter.lab._constraints import USUAL, at_least, below_one, check_fields, distance
from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import named_directory, numbered_directory
from gradfilter.lab._usage import check

EVALUATIONS = 40
MICROBATCHES = 8


@dataclass(frozen=True)
class DemoConfig:
    """Train one network in three ways on digits with wrong labels, side by side.

    Plain SGD, microbatches that have to agree, and a consensus of per-sample gradients start from
    the same parameters and see the same batches. The demo prints a table and writes metrics,
    settings, a checkpoint of each run and a plot. Nothing is tuned on the test split. In 2, 4 or 8
    processes (torchrun --nproc-per-node 2 -m gradfilter demo) each computes its part of every
    batch, and the training is the same.
    """

    noise: Annotated[
        float, below_one("a fraction", "0.3 makes 30 % of the training labels wrong.")
    ] = 0.3
    """Fraction of the training labels that are wrong, in [0, 1)."""
    threshold: Annotated[float, distance("0.9 is the default, 2 accepts everything.")] = 0.9
    """Largest cosine distance at which microbatches agree, in [0, 2]."""
    steps: Annotated[int, at_least(1, USUAL)] = 800
    """Number of steps of each training, of 80 samples each."""
    seed: Annotated[int, at_least(0, USUAL)] = 0
    """Seed of the split, the noise, the initial parameters and the batches."""
    seeds: Annotated[int, at_least(1, "5 gives mean ± sd.")] = 1
    """Number of seeds, from --seed on; two or more give mean ± standard deviation."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, ... With cuda, each process uses its own GPU."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of parameters and images."""
    out: Path | None = None
    """Directory of the results, new or empty. By default a new one in runs/."""


def check_values(config: DemoConfig) -> None:
    """Refuse values that are out of range, and a number of processes that cannot share a batch.

    Raises:
        UsageError: A value is out of range.
    """
    check_fields(config)
    check(
        MICROBATCHES % started_processes() == 0,
        "torchrun",
        f"1, 2, 4 or {MICROBATCHES} processes, for {MICROBATCHES} microbatches",
        started_processes(),
        "Choose another --nproc-per-node.",
    )


def directory(config: DemoConfig) -> Path:
    """Make the directory for the results.

    Raises:
        UsageError: The directory cannot be written to, or it holds other files.
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
    """Return the number of steps between two evaluations."""
    return max(1, steps // EVALUATIONS)
