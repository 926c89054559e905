"""Several uses of one leaf, or rows too many to hold: summed tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _products
from gradfilter.grads._factor import Factor

TILE = 2**24
"""Bytes of rows that are held at a time."""


@dataclass(eq=False)
class TiledFactor(Factor):
    """The sum of the rows of several factors of one leaf.

    The Gram of a sum is not the sum of the Grams: a weight that is used twice has cross terms. So
    the rows are made after all, for some of the leaf's units at a time, and dropped.

    Attributes:
        parts: One factor for each use of the leaf.
    """

    parts: list[Factor]

    def __post_init__(self) -> None:
        self.count, self.shape = self.parts[0].count, self.parts[0].shape
        self.unit = max(part.unit for part in self.parts)

    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """The sum of the parts' rows."""
        rows = self.parts[0].rows(low, high)
        for part in self.parts[1:]:
            rows = rows + part.rows(low, high)
        return rows

    def _tiles(self) -> Iterator[Tensor]:
        """The rows (M, ...), some units at a time."""
        if not self.shape:
            yield self.rows().reshape(self.count, 1)
            return
        per_unit = self.count * self.shape[1:].numel() * 4
        step = max(self.unit, TILE // max(per_unit, 1) // self.unit * self.unit)
        for low in range(0, self.shape[0], step):
            yield self.rows(low, min(low + step, self.shape[0])).reshape(self.count, -1)

    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Of all parts."""
        total = self.parts[0].total(weights, live)
        for part in self.parts[1:]:
            total = total + part.total(weights, live)
        return total

    def dot(self, leaf: Tensor) -> Tensor:
        """Of all parts."""
        return torch.stack([part.dot(leaf) for part in self.parts]).sum(0)

    def gram(self) -> Tensor:
        """Tile by tile."""
        return torch.stack([_products.inner(tile, tile) for tile in self._tiles()]).sum(0)

    def sq_norms(self) -> Tensor:
        """Tile by tile, or of the only part."""
        if len(self.parts) == 1:
            return self.parts[0].sq_norms()
        return torch.stack([_products.row_sq_norms(tile) for tile in self._tiles()]).sum(0)
