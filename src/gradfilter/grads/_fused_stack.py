"""The stack of the fused plan: no rows, only answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._checks import check_per_row, check_same_leaves, first_rows, scale_rows
from gradfilter.grads._immutable import copied
from gradfilter.grads._lift import untraced
from gradfilter.grads._modes import Layer
from gradfilter.grads._pass import Pass

LARGEST_GRAM = 2048
"""Rows from which a Gram is too large to be made where something else will do."""


@copied("losses", "scale")
@dataclass(frozen=True, eq=False, repr=False)
class FusedStack(AgainStack):
    """The rows of a `Pass`, cut to some leaves and to the first ones, and scaled.

    Each question is answered by the cheapest way there is, and what it took is shared with the
    next: the Gram and the combination that a filter asks for cost one backward pass and the
    products of the Gram; the rows themselves are made by `stacked` alone.
    """

    run: Pass
    names: tuple[str, ...]
    count: int
    losses: Tensor
    buffers: Tree
    aux: Any
    origin: Origin
    scale: Tensor | None = None

    def __len__(self) -> int:
        """M."""
        return self.count

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return {name: self.run.shapes[name] for name in self.names}

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.run.device

    def _empty(self) -> Tensor | None:
        """Rows with a NaN loss and gradient zero. (M,) bool."""
        empty = untraced(self.run.empty)()
        return None if empty is None else empty[: self.count]

    @property
    def overrides(self) -> Mapping[str, int]:
        """How often each rule ran for all rows at once, by its name."""
        return dict(self.run.overrides)

    @property
    def layers(self) -> list[Layer]:
        """How each leaf's rows are treated."""
        return [self.run.modes.layers[name] for name in self.names]

    def explain(self) -> None:
        """Print the mode, the extra flops and the kept bytes of every leaf."""
        print(self.run.modes)
        if self.groups:
            rows = "; ".join(", ".join(map(str, group)) for group in self.groups)
            print(f"{len(self.groups)} passes, for the loss asks rows what they differ in: {rows}")
        if self.run.by_row:
            print(f"row by row inside the pass: {', '.join(self.run.by_row)}")

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each pass, where rows that answer the host differently have their own."""
        return self.run.groups

    def gram_is_cheap(self) -> bool:
        """By the flops of both ways, as long as M x M numbers are few."""
        return self.run.modes.gram_is_cheap and self.run.count <= LARGEST_GRAM

    def release(self) -> None:
        """Let go of the pass."""
        self.run.release()

    def gram(self) -> Tensor:
        """K = J Jᵀ. (M, M)."""
        gram, scale = untraced(self.run.gram)(self.names)[: self.count, : self.count], self.scale
        # The pass keeps its Gram: of few numbers everybody gets a copy.
        return gram.clone() if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M,)."""
        norms, scale = untraced(self.run.sq_norms)(self.names)[: self.count], self.scale
        return norms.clone() if scale is None else scale_rows(scale_rows(norms, scale), scale)

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(untraced(self.run.dot)(dict(tree))[: self.count], self.scale)

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, with rows of weight 0 masked."""
        check_per_row("weight", weights, self.count)
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        if self.count < self.run.count:
            weights = torch.cat([weights, weights.new_zeros(self.run.count - self.count)])
        return untraced(self.run.total)(self.names, weights)

    def stacked(self) -> Tree:
        """The rows, leaf by leaf."""
        rows = untraced(self.run.rows)(self.names)
        return {n: scale_rows(leaf[: self.count], self.scale) for n, leaf in rows.items()}

    def _scaled(self, scale: Tensor) -> FusedStack:
        return replace(self, scale=scale)

    def _columns(self, names: Collection[str]) -> FusedStack:
        return replace(self, names=tuple(name for name in self.names if name in names))

    def _first(self, count: int) -> FusedStack:
        losses, aux, scale = first_rows((self.losses, self.aux, self.scale), count)
        return replace(self, count=count, losses=losses, aux=aux, scale=scale)
