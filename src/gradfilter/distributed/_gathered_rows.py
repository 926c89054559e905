"""The rows of all ranks before a `RankStack` cuts or scales them; questions are collectives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._types import Tree
from gradfilter.distributed._departures import added_up_early, exchanged_early, last_first
from gradfilter.distributed._ranks import Bucket, Ranks, added_up, combined, exchanged, reduced
from gradfilter.grads._stack import GradStack
from gradfilter.grads.fused._fused_stack import FusedStack


def per_row(stack: GradStack, keep: Tensor | bool = True) -> Tensor:
    """Return the mask of live rows, their losses if known, and the rank's keep flag. (3, M)."""
    live = stack.live.to(_tree.sum_dtype(stack.live))
    losses = live if stack.losses is None else stack.losses.detach().to(live.dtype)
    return torch.stack(
        [live, losses, _tree.as_bool_tensor(keep, live.device).to(live.dtype).expand_as(live)]
    )


@dataclass(eq=False)
class GatheredRows:
    """W times M rows, M of them here. All methods but `local_part` are collectives.

    Attributes:
        local: The M rows of this rank.
        ranks: The ranks that hold the rows.
        numbers: The result of `per_row` on every rank, gathered at the start, because later only
            some ranks may ask. (W, 3, M)
        leaves_early: True if every rank computes its rows by one backward pass, during which
            complete leaves are sent.
    """

    local: GradStack
    ranks: Ranks
    numbers: Tensor
    leaves_early: bool = False
    _gram: Tensor | None = None
    _buckets: list[Bucket] | None = None

    @property
    def live(self) -> Tensor:
        """A mask of the rows that take part, rank by rank. (M·W,) bool."""
        return self.numbers[:, 0].flatten() != 0

    @property
    def losses(self) -> Tensor | None:
        """The losses of all rows, if they are known. (M·W,)."""
        if self.local.losses is None:
            return None
        return self.numbers[:, 1].flatten().to(self.local.losses.dtype)

    @property
    def keep(self) -> Tensor:
        """True if no rank skips the step. () bool."""
        return (self.numbers[:, 2] != 0).all()

    def __len__(self) -> int:
        """Return M·W."""
        return len(self.local) * self.ranks.size

    def local_part(self, per_row: Tensor) -> Tensor:
        """Return this rank's part of a tensor with one entry per row. (M, ...)."""
        start = len(self.local) * self.ranks.rank
        return per_row[start : start + len(self.local)]

    def columns(self, names: Collection[str]) -> GatheredRows:
        """Return the same rows on some of the leaves."""
        return replace(self, local=self.local.columns(names), _gram=None, _buckets=None)

    @property
    def is_exchanged(self) -> bool:
        """True if every rank holds a shard of all rows, or their Gram."""
        return self._gram is not None

    def gram(self) -> Tensor:
        """Compute J Jᵀ, with the same bits on every rank. (M·W, M·W)."""
        if self._gram is None:
            buckets, parts = [], []
            for bucket in self._exchanged():
                parts.append(_products.inner(bucket.shard, bucket.shard))
                buckets.append(bucket)
            self._buckets = buckets
            self._gram = self.ranks.total(torch.stack(parts).sum(0))
        return self._gram.clone()  # the caller may write into the copy

    def combine(self, weights: Tensor) -> Tree:
        """Compute wᵀ J for weights (M·W,), with the same bits on every rank."""
        weights = weights.detach()
        if self._buckets is not None:
            buckets = self._buckets
            if len(self.local) == 1:
                self._buckets = None  # the sum is written into their memory
            return self._in_order(combined(buckets, weights, self.ranks))
        # Without shards of all rows, only the sum of the local rows must be sent.
        own = self.local_part(weights)
        early = self.leaves_early and added_up_early(self._of_one_pass, own, self.ranks)
        return early or self._in_order(added_up(last_first(self.local.combine(own)), self.ranks))

    def sum_squares(self, weights: Tensor) -> Tree:
        """Compute Σ_m w_m g_m² for weights (M·W,), with the same bits on every rank."""
        own = self.local.sum_squares(self.local_part(weights.detach()))
        return self._in_order(added_up(last_first(own), self.ranks))

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Compute J v. (M·W,)."""
        return self.ranks.gather(self.local.dot(tree)).flatten()

    def sq_norms(self) -> Tensor:
        """Compute diag(J Jᵀ). (M·W,)."""
        if self._gram is not None:
            return self._gram.diagonal().clone()
        return self.ranks.gather(self.local.sq_norms()).flatten()

    def stacked(self, choose: Callable[[Tensor], Tensor]) -> Tree:
        """Return ``choose`` of all rows (M·W, *shape) of each leaf, on every rank."""
        own = self.local.stacked().items()
        return {name: choose(self.ranks.gather(leaf).flatten(0, 1)) for name, leaf in own}

    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """Apply a function (M·W, n) -> (n,) to the columns, each on one rank."""
        buckets = list(self._exchanged()) if self._buckets is None else self._buckets
        return self._in_order(reduced(buckets, function, self.ranks))

    @property
    def _of_one_pass(self) -> FusedStack:
        assert isinstance(self.local, FusedStack)  # else `can_leave_early` is False
        return self.local

    def _in_order(self, tree: Tree) -> Tree:
        """Return a tree with its leaves in the order of the rows."""
        return {name: tree[name] for name in self.local.shapes}

    def _exchanged(self) -> Iterable[Bucket]:
        """Send every rank its shard of the local rows; during the backward pass if possible."""
        early = self.leaves_early and exchanged_early(self._of_one_pass, self.ranks)
        return early or exchanged(last_first(self.local.stacked()), self.ranks)

    def release(self) -> None:
        """Free the shards, and everything that the local rows can compute again."""
        self._buckets = None
        self.local.release()
