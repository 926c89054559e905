"""Rows that are held, where they are too small for anything cleverer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._types import Tree
from gradfilter.grads._factor import Factor


@dataclass(eq=False)
class DenseFactor(Factor):
    """The rows (M, *shape) themselves."""

    held: Tensor

    def __post_init__(self) -> None:
        self.count, self.shape = len(self.held), self.held.shape[1:]

    def _matrix(self) -> Tensor:
        return self.held.reshape(self.count, -1)

    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """A slice of them."""
        return self.held if self.held.ndim == 1 else self.held[:, low:high]

    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """One weighted sum."""
        if weights is None:
            if live is None:
                return self.held.sum(0) if self.count > 1 else self.held[0]
            weights = live.to(_tree.wide(self.held))
        if live is None:
            rows = _tree.at_least_float32(self._matrix())
            with _tree.no_autocast(rows):
                total = weights.to(rows.dtype) @ rows
            return total.view(self.shape).to(self.held.dtype)
        return _products.weighted_sum(weights, self._matrix()).view(self.shape).to(self.held.dtype)

    def dot(self, leaf: Tensor) -> Tensor:
        """One product."""
        return _products.inner(self._matrix(), leaf.reshape(1, -1))[:, 0]

    def gram(self) -> Tensor:
        """One product."""
        return _products.inner(self._matrix(), self._matrix())

    def sq_norms(self) -> Tensor:
        """Norms of the rows."""
        return _products.row_sq_norms(self._matrix())


JOINED = ""
"""The name of what is made of several leaves."""


def small_dense(factors: Mapping[str, Factor], names: Collection[str]) -> list[str]:
    """The leaves among some whose few rows are held."""
    return [
        name
        for name, factor in factors.items()
        if name in names
        and isinstance(factor, DenseFactor)
        and factor.shape.numel() < _products.SMALL
    ]


def join_dense(factors: Mapping[str, Factor], names: list[str]) -> dict[str, Factor]:
    """Leaves whose rows are held, as one."""
    if not names:
        return {}
    matrices = [factors[name].rows().reshape(factors[name].count, -1) for name in names]
    return {JOINED: DenseFactor(torch.cat([_tree.at_least_float32(m) for m in matrices], 1))}


def split_joined(total: Tensor, names: list[str], shapes: Mapping[str, torch.Size]) -> Tree:
    """A combination of joined rows, leaf by leaf."""
    parts = torch.split_with_sizes(total, [shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}
