"""The rows of all ranks, before they are cut or scaled: what every view of them shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._types import Tree
from gradfilter.distributed._exchange import Bucket, added_up, combined, exchanged
from gradfilter.distributed._ranks import Ranks
from gradfilter.grads._stack import GradStack


def per_row(stack: GradStack, keep: Tensor | bool = True) -> Tensor:
    """Whether rows take part, their losses if known, and whether their rank skips. (3, M)."""
    live = stack.live.to(_tree.wide(stack.live))
    losses = live if stack.losses is None else stack.losses.detach().to(live.dtype)
    return torch.stack([live, losses, _tree.flag(keep, live.device).to(live.dtype).expand_as(live)])


@dataclass(eq=False)
class SpreadRows:
    """W times M rows, M of them here. All methods but `mine` are collectives.

    Attributes:
        local: The M rows of this rank.
        ranks: Where the rows are.
        numbers: What `per_row` says on every rank, gathered at once: later only some ranks may ask.
            (W, 3, M)
    """

    local: GradStack
    ranks: Ranks
    numbers: Tensor
    _gram: Tensor | None = None
    _buckets: list[Bucket] | None = None

    @property
    def live(self) -> Tensor:
        """Which rows take part, rank-major. (M·W,) bool."""
        return self.numbers[:, 0].flatten() != 0

    @property
    def losses(self) -> Tensor | None:
        """Of all rows, if they are known. (M·W,)."""
        if self.local.losses is None:
            return None
        return self.numbers[:, 1].flatten().to(self.local.losses.dtype)

    @property
    def keep(self) -> Tensor:
        """Whether no rank skips the step. () bool."""
        return (self.numbers[:, 2] != 0).all()

    def __len__(self) -> int:
        """M·W."""
        return len(self.local) * self.ranks.size

    def mine(self, per_row: Tensor) -> Tensor:
        """This rank's part of a tensor with one entry per row. (M, ...)."""
        start = len(self.local) * self.ranks.rank
        return per_row[start : start + len(self.local)]

    def columns(self, names: Collection[str]) -> SpreadRows:
        """The same rows on some of the leaves."""
        return SpreadRows(self.local.columns(names), self.ranks, self.numbers)

    @property
    def is_exchanged(self) -> bool:
        """Whether every rank holds a shard of all rows, or their Gram."""
        return self._gram is not None

    def gram(self) -> Tensor:
        """J Jᵀ, the same bits on every rank. (M·W, M·W)."""
        if self._gram is None:
            buckets, parts = [], []
            for bucket in exchanged(self.local.stacked(), self.ranks):
                parts.append(_products.inner(bucket.shard, bucket.shard))
                buckets.append(bucket)
            self._buckets = buckets
            self._gram = self.ranks.total(torch.stack(parts).sum(0))
        return self._gram.clone()  # the caller's, who may write to it

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J for weights (M·W,), the same bits on every rank."""
        weights = weights.detach()
        if self._buckets is not None:
            buckets = self._buckets
            if len(self.local) == 1:
                self._buckets = None  # their memory will hold the sum
            return combined(buckets, weights, self.ranks)
        # Without shards of all rows, the sum of the local ones is all that has to travel.
        return added_up(self.local.combine(self.mine(weights)), self.ranks)

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M·W,)."""
        return self.ranks.gather(self.local.dot(tree)).flatten()

    def sq_norms(self) -> Tensor:
        """diag(J Jᵀ). (M·W,)."""
        if self._gram is not None:
            return self._gram.diagonal().clone()
        return self.ranks.gather(self.local.sq_norms()).flatten()

    def stacked(self) -> Tree:
        """All rows, on every rank. (M·W, *shape)."""
        return {n: self.ranks.gather(g).flatten(0, 1) for n, g in self.local.stacked().items()}

    def release(self) -> None:
        """Let go of the shards, and of what the local rows were computed from."""
        self._buckets = None
        self.local.release()
