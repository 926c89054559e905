"""Random numbers that belong to a sample, whatever batch, process or order it comes in."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["jitter", "start", "probes"]


def seeds(seed: int, purpose: Purpose, ids: Tensor) -> list[int]:
    """A seed of one purpose for every sample.

    Args:
        seed: Of the whole measurement, >= 0.
        purpose: What the numbers are for.
        ids: Of the samples. (N,)
    """
    return [
        int(_sequence(seed, purpose, sample).generate_state(1, np.uint64)[0] >> 1)
        for sample in ids.tolist()
    ]


def uniform(
    seed: int, purpose: Purpose, ids: Tensor, shape: tuple[int, ...], low: float, high: float
) -> Tensor:
    """Numbers U[low, high] for every sample. (N, *shape) float64, on the host."""
    draws = [
        np.random.default_rng(_sequence(seed, purpose, sample)).uniform(low, high, shape)
        for sample in ids.tolist()
    ]
    return torch.from_numpy(np.stack(draws))


def _sequence(seed: int, purpose: Purpose, sample: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, *purpose.encode(), sample])
