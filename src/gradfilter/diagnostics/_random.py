"""Random vectors that depend on a seed alone: not on the device, nor on who else is in a batch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

Seeds = SupportsIndex | Sequence[SupportsIndex] | Tensor


def normals(seeds: Seeds, like: Tensor) -> Tensor:
    """Standard normal numbers in the shape of ``like`` (N, D), row i by the seed of sample i."""
    return next(_draws(seeds, like, signs=False))


def signs(seeds: Seeds, like: Tensor) -> Iterator[Tensor]:
    """Probes of ±1 in the shape of ``like`` (N, D), one after the other without end."""
    return _draws(seeds, like, signs=True)


def _draws(seeds: Seeds, like: Tensor, *, signs: bool) -> Iterator[Tensor]:
    count, size = like.shape
    if hasattr(seeds, "tolist"):  # of torch, or of NumPy
        seeds = seeds.tolist()
    if isinstance(seeds, SupportsIndex):
        each = [operator.index(seeds)]  # the same numbers for every sample
    else:
        each = [int(seed) for seed in seeds]
        if len(each) != count:
            raise ValueError(
                f"Expected `seed` as one number, or {count} of them, one per sample, found "
                f"{len(each)}."
            )
    # Drawn on the CPU: a GPU's generators give other numbers.
    generators = [torch.Generator().manual_seed(seed) for seed in each]
    while True:
        rows = []
        for generator in generators:
            if signs:
                rows.append(2.0 * torch.randint(2, (size,), generator=generator) - 1)
            else:
                rows.append(torch.randn(size, generator=generator, dtype=torch.float64))
        yield torch.stack(rows).to(like).expand(count, -1)
