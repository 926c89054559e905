"""Several uses of one leaf, or rows too many to hold: summed tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter.grads._factor import Factor, tiled_gram, tiled_sq_norms


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
        return tiled_gram(self)

    def sq_norms(self) -> Tensor:
        """Tile by tile, or of the only part."""
        if len(self.parts) == 1:
            return self.parts[0].sq_norms()
        return tiled_sq_norms(self)
