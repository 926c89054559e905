"""Rows that are held, where they are too small for anything cleverer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradfilter import _tree
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
                return self.held.sum(0)
            weights = live.to(_tree.wide(self.held))
        return _tree.weighted_sum(weights, self._matrix()).view(self.shape).to(self.held.dtype)

    def dot(self, leaf: Tensor) -> Tensor:
        """One product."""
        return _tree.inner(self._matrix(), leaf.reshape(1, -1))[:, 0]

    def gram(self) -> Tensor:
        """One product."""
        return _tree.inner(self._matrix(), self._matrix())

    def sq_norms(self) -> Tensor:
        """Norms of the rows."""
        return _tree.row_sq_norms(self._matrix())

    @property
    def bytes(self) -> int:
        """The rows."""
        return self.held.nbytes
