"""The trace of symmetric matrices that are known by their products only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._random import Seeds, signs


def trace(
    product: Callable[[Tensor], Tensor], like: Tensor, *, probes: int, seeds: Seeds
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of vᵀ A v over random v of ±1; exact if that takes no more products.

    Args:
        product: (N, D) -> (N, D), each row times the matrix of its sample.
        like: (N, D), for shape, dtype and device.
        probes: At least 2.
        seeds: One, or one per sample.

    Returns:
        Traces and their standard errors, both (N,), float64.
    """
    size = like.shape[1]
    exact = probes >= size
    vectors = _units(like) if exact else islice(signs(seeds, like), probes)
    wide = _tree.wide(like)
    found = torch.stack([(v * product(v)).sum(1, dtype=wide) for v in vectors])  # (probes, N)
    if exact:
        return found.sum(0), torch.zeros_like(found[0])
    return found.mean(0), found.std(0) / probes**0.5


def _units(like: Tensor) -> Iterator[Tensor]:
    """The unit vectors, each for all samples."""
    for index in range(like.shape[1]):
        unit = torch.zeros_like(like)
        unit[:, index] = 1
        yield unit
