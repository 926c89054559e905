"""The rows of an embedding's table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter.grads._factor import Divisible, by_rows, paired, tiled_gram, weigh


@dataclass(eq=False)
class EmbeddingFactor(Divisible):
    """row_m = Σ_t e(index_mt) ⊗ grad_mt: indices (M, n) and output gradients (M, n, width)."""

    index: Tensor
    grads: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        self.count = len(self.index)

    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Scattered into the table's units from low to high."""
        units = len(range(self.shape[0])[low:high])
        index, grads = self.index - low, self.grads
        if units < self.shape[0]:
            inside = (index >= 0) & (index < units)
            index, grads = torch.where(inside, index, 0), grads * inside[..., None]
        first = torch.arange(self.count, device=index.device)[:, None] * units
        table = grads.new_zeros(self.count * units, self.shape[1])
        table.index_add_(0, (index + first).flatten(), grads.flatten(0, 1))
        return table.view(self.count, units, self.shape[1])

    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Scattered into one table, weighted."""
        grads = weigh(self.grads, weights, live).flatten(0, 1)
        return grads.new_zeros(self.shape).index_add_(0, self.index.flatten(), grads)

    def dot(self, leaf: Tensor) -> Tensor:
        """The leaf looked up, paired with the output gradients."""
        return paired(leaf[self.index].to(self.grads.dtype), self.grads)

    def part(self, low: int, high: int) -> Self:
        """The same for some of the M rows."""
        return replace(self, index=self.index[low:high], grads=self.grads[low:high])

    def gram(self) -> Tensor:
        """Products wherever two positions share a unit, or from the rows where that takes less."""
        n = self.index.shape[1]
        if n * n > self.shape[0]:
            return tiled_gram(self)
        index, grads = self.index.flatten(), _tree.at_least_float32(self.grads).flatten(0, 1)
        gram = torch.empty(self.count, self.count, dtype=_tree.wide(grads), device=grads.device)
        with _tree.no_autocast(grads):
            for m in range(self.count):  # the products of one row at a time
                own = slice(m * n, (m + 1) * n)
                products = grads[own] @ grads[: (m + 1) * n].T
                same = index[own, None] == index[None, : (m + 1) * n]
                # Not a product with 0: what is not finite elsewhere does not belong here.
                shared = torch.where(same, products, 0.0).view(n, m + 1, n)
                gram[m, : m + 1] = gram[: m + 1, m] = shared.sum((0, 2), dtype=gram.dtype)
        return gram

    def sq_norms(self) -> Tensor:
        """As `gram`, for each row with itself; of many positions from their sums per unit."""
        n, width = self.grads.shape[1:]
        if n <= width:
            return by_rows(self, 12 * n * n, EmbeddingFactor._sq_norms_of_pairs)
        return by_rows(self, 12 * n * width, EmbeddingFactor._sq_norms_of_sums)

    def _sq_norms_of_pairs(self) -> Tensor:
        grads = _tree.at_least_float32(self.grads)
        with _tree.no_autocast(grads):
            products = torch.bmm(grads, grads.mT)
        same = self.index[:, :, None] == self.index[:, None, :]
        norms = torch.where(same, products, 0.0).sum((1, 2), dtype=_tree.wide(grads))
        return norms.clamp(min=0)

    def _sq_norms_of_sums(self) -> Tensor:
        """Positions sorted by unit, those of one unit summed: never more than there are grads."""
        index, order = self.index.sort(1)
        begins = torch.ones_like(index, dtype=torch.bool)
        torch.ne(index[:, 1:], index[:, :-1], out=begins[:, 1:])
        place = begins.flatten().cumsum(0) - 1  # of the unit a position belongs to
        grads = _tree.at_least_float32(self.grads)
        grads = grads.gather(1, order[..., None].expand_as(grads)).flatten(0, 1)
        sums = torch.zeros_like(grads).index_add_(0, place, grads)
        norms = _products.row_sq_norms(sums)[place].view(index.shape)
        return torch.where(begins, norms, 0.0).sum(1)
