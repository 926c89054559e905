"""The stack that holds its rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._readable import readable
from gradfilter._types import Tree
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._checks import check_per_row, check_same_leaves, first_rows, scale_rows
from gradfilter.grads._immutable import copied, versions, written
from gradfilter.grads._stack import GradStack


@copied("losses", "scale", "empty")
@dataclass(frozen=True, eq=False, repr=False)
class DenseStack(AgainStack):
    """A stack that holds its rows.

    Args:
        rows: One tensor per leaf with leading axis M, for example the output of
            ``torch.func.vmap(torch.func.grad(f), ...)``.
        losses: (M,), if known.
        buffers: Buffers after the M microbatches.
        aux: A tree of tensors with leading axis M.
        scale: (M,) factors, applied where the rows are used.
        origin: How to compute the rows again; without it `at` and `at_rows` raise.
        empty: (M,) bool, if known; else found from losses and rows.

    Raises:
        TypeError: ``rows`` is not a dict of tensors.
        ValueError: The leaves disagree on M, or there are none.
        RuntimeError: At a question, some of the rows were written to in the meantime.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = gf.DenseStack({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> rows.combine(torch.tensor([0.5, 0.5]))
        {'w': tensor([1.5000, 2.5000])}
    """

    rows: Tree
    losses: Tensor | None = None
    buffers: Tree = field(default_factory=dict)
    aux: Any = None
    scale: Tensor | None = None
    origin: Origin | None = None
    empty: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the leaves are tensors with one leading axis M."""
        if not isinstance(self.rows, dict) or not all(
            isinstance(leaf, Tensor) for leaf in self.rows.values()
        ):
            raise TypeError(
                "Expected rows as dict[str, Tensor] with leading axis M on every leaf, found "
                f"{type(self.rows).__name__}. Flatten nested trees to dotted names."
            )
        sizes = {name: leaf.shape[0] if leaf.ndim else 0 for name, leaf in self.rows.items()}
        if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(
                f"Expected one leading axis M >= 1 on every leaf, found sizes {sizes}. Stack the "
                "M gradients of each parameter along dim 0."
            )
        object.__setattr__(self, "_versions", versions(self.rows))

    def __len__(self) -> int:
        """The number of rows, M."""
        return int(next(iter(self.rows.values())).shape[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return {name: leaf.shape[1:] for name, leaf in self.rows.items()}

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return _tree.device_of(self.rows)

    def release(self) -> None:
        """Nothing to let go of: the rows are what the stack is."""

    def _check_unwritten(self) -> None:
        """Refuse to answer from rows that are no longer what they were."""
        names = written(self.rows, self.__dict__["_versions"])
        if names:
            raise RuntimeError(
                f"Expected rows as they were when the stack was made, found {names[0]!r} written "
                "in place since. Write to a copy: stack.stacked() gives the rows themselves, "
                "{name: leaf.clone() for name, leaf in stack.stacked().items()} copies of them."
            )

    def _matrices(self) -> list[Tensor]:
        """The leaves as matrices (M, p)."""
        self._check_unwritten()
        return [leaf.reshape(len(self), -1) for leaf in self.rows.values()]

    def _empty(self) -> Tensor | None:
        """Rows with a NaN loss and gradient zero. (M,) bool."""
        known, losses = self.empty, self.losses
        if known is not None or losses is None:
            return known
        lost: Tensor = losses.isnan()
        if readable(lost) and not any(lost.tolist()):
            return None
        unscaled = self if self.scale is None else replace(self, scale=None)
        return lost & (unscaled.sq_norms() == 0)

    def _total(self, per_leaf: list[Tensor]) -> Tensor:
        """The sum over leaves."""
        return torch.stack(per_leaf).sum(0)

    def gram(self) -> Tensor:
        """K = J Jᵀ, leaf by leaf. (M, M)."""
        gram, scale = self._total([_products.inner(g, g) for g in self._matrices()]), self.scale
        return gram if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        parts = [
            _products.inner(matrix, tree[name].reshape(1, -1))[:, 0]
            for name, matrix in zip(self.rows, self._matrices(), strict=True)
        ]
        return scale_rows(self._total(parts), self.scale)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M,)."""
        norms = self._total([_products.row_sq_norms(g) for g in self._matrices()])
        scale = self.scale
        return norms if scale is None else scale_rows(scale_rows(norms, scale), scale)

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, with rows of weight 0 masked."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)

        def weigh(leaf: Tensor, matrix: Tensor) -> Tensor:
            total = _products.weighted_sum(weights, matrix)
            return total.to(leaf.dtype).reshape(leaf.shape[1:])

        pairs = zip(self.rows.items(), self._matrices(), strict=True)
        return {name: weigh(leaf, matrix) for (name, leaf), matrix in pairs}

    def stacked(self) -> Tree:
        """The rows, leaf by leaf: the tensors held, or scaled copies of them."""
        self._check_unwritten()
        scale = self.scale
        return {name: scale_rows(leaf, scale) for name, leaf in self.rows.items()}

    def _scaled(self, scale: Tensor) -> DenseStack:
        self._check_unwritten()
        return replace(self, scale=scale)

    def _columns(self, names: Collection[str]) -> DenseStack:
        self._check_unwritten()
        rows = {n: leaf for n, leaf in self.rows.items() if n in names}
        # A row is empty as a whole.
        return replace(self, rows=rows, empty=self._empty())

    def _first(self, count: int) -> DenseStack:
        self._check_unwritten()
        per_row = (self.rows, self.losses, self.aux, self.scale, self.empty)
        rows, losses, aux, scale, empty = first_rows(per_row, count)
        return replace(self, rows=rows, losses=losses, aux=aux, scale=scale, empty=empty)


def as_stack(grads: GradStack | Tree) -> GradStack:
    """A GradStack as it is; a plain stacked dict as a `DenseStack`."""
    return grads if isinstance(grads, GradStack) else DenseStack(grads)
