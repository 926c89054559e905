"""The stack whose rows live on different ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.distributed._meeting import met
from gradfilter.distributed._ranks import Ranks
from gradfilter.distributed._spread import SpreadRows, per_row
from gradfilter.grads._again import AgainStack
from gradfilter.grads._checks import check_per_row, check_same_leaves, check_shapes, scale_rows
from gradfilter.grads._dense import as_stack
from gradfilter.grads._immutable import copied
from gradfilter.grads._stack import GRAM_UP_TO, GradStack

FEW = 2
"""Local rows up to which exchanging them sends less than the two sums of a rule without Gram."""


@copied("losses", "scale")
class RankStack(AgainStack):
    r"""Rows that live on different ranks, as one stack: row r·M + m is row m of rank r.

    Every rank gives its own M rows and asks the same questions in the same order; all get the same
    answers, bit for bit, and so take the same decisions. Links need not know.

    ``gram`` sends every rank one shard of the local rows, takes a Gram there, and adds up the
    (M·W)² numbers; ``combine`` then sums on the shard and gathers. Of P parameters a rank sends

        gram:                   M·P (W − 1)/W numbers
        combine after a gram:     P (W − 1)/W
        combine without one:    2·P (W − 1)/W
        dot, sq_norms:          M to every other rank

    For M = 1 a gram and a combination are what one ring all-reduce sends. `consensus_filter` takes
    that way up to M = 2, else two combinations without a gram. ``stacked``, and so a
    `sam_perturb` per microbatch, brings all rows to all ranks: see `across_ranks` for better.

    Making a stack compares rows and leaves of all ranks, by a short message between CPUs, and
    gathers the losses. ``buffers`` and ``aux`` are the local ones: BatchNorm keeps statistics per
    rank, as in DistributedDataParallel without SyncBatchNorm.

    Args:
        stack: The local rows: a GradStack or a plain stacked dict, M as large on every rank.
        group: The process group; None for all processes.
        keep: False where this rank would skip the step, () bool; None if nobody asks.

    Attributes:
        keep: Whether no rank would skip the step, the same on all. () bool.

    Raises:
        ValueError: Rows, leaves, shapes or dtypes differ between ranks; raised on all of them.
        RuntimeError: There is no process group; at any question, another rank is gone.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from gradfilter.distributed import RankStack
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rows = RankStack({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        stack: GradStack | Tree,
        group: dist.ProcessGroup | None = None,
        *,
        keep: Tensor | bool | None = None,
    ) -> None:
        local, ranks = as_stack(stack), Ranks.of(group)
        self._view(met(local, ranks, keep), None, len(local) * ranks.size)

    def _view(self, spread: SpreadRows, scale: Tensor | None, count: int) -> Self:
        """The first ``count`` of the rows, scaled."""
        self._spread, self.scale, self._count = spread, scale, count
        self.origin = None
        losses = spread.losses
        self.losses = None if losses is None else losses[:count]
        self.keep = spread.keep
        self.buffers, self.aux = spread.local.buffers, spread.local.aux
        return self

    def _like_this(self, spread: SpreadRows, scale: Tensor | None, count: int) -> Self:
        return self.__new__(type(self))._view(spread, scale, count)

    def _scaled(self, scale: Tensor) -> Self:
        return self._like_this(self._spread, scale, self._count)

    def _columns(self, names: Collection[str]) -> Self:
        return self._like_this(self._spread.columns(names), self.scale, self._count)

    def _first(self, count: int) -> Self:
        scale = None if self.scale is None else self.scale[:count]
        return self._like_this(self._spread, scale, count)

    def __len__(self) -> int:
        """The number of rows on all ranks together, M·W."""
        return self._count

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return self._spread.local.shapes

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._spread.numbers.device

    @property
    def live(self) -> Tensor:
        """Which rows take part. (M·W,) bool."""
        live = self._spread.live[: self._count]
        return live if self.scale is None else live & (self.scale != 0)

    def gram_is_cheap(self) -> bool:
        """Whether the rows are exchanged already, or that sends less than two combinations."""
        few = len(self._spread.local) <= FEW and len(self) <= GRAM_UP_TO
        return few or self._spread.is_exchanged

    def gram(self) -> Tensor:
        """K = J Jᵀ. (M·W, M·W)."""
        gram = scale_rows(self._spread.gram()[: self._count, : self._count], self.scale)
        return scale_rows(gram.T, self.scale).T

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J for ``weights`` (M·W,), the same on every rank."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        cut_off = weights.new_zeros(len(self._spread) - len(self))
        return self._spread.combine(torch.cat([weights, cut_off]))

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v for a tree v that is the same on every rank. (M·W,)."""
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(self._spread.dot(tree)[: self._count], self.scale)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M·W,)."""
        norms = scale_rows(self._spread.sq_norms()[: self._count], self.scale)
        return scale_rows(norms, self.scale)

    def stacked(self) -> Tree:
        """All rows on every rank, leaf by leaf. (M·W, *shape)."""
        rows = self._spread.stacked().items()
        return {name: scale_rows(leaf[: self._count], self.scale) for name, leaf in rows}

    def at(self, params: Params) -> GradStack:
        """The same rows at other parameters, which are the same on every rank."""
        return self._again(self._spread.local.at(params))

    def at_rows(self, params: Tree) -> GradStack:
        """The same rows, row r·M + m at its own parameters. Leaves are (M·W, *shape)."""
        unknown = sorted(set(params) - set(self.shapes))
        if unknown:
            raise ValueError(
                f"Expected parameters among {sorted(self.shapes)}, found unknown {unknown}."
            )
        check_shapes(self.shapes, params, "at_rows", rows=len(self))
        own = {}
        for name, leaf in params.items():
            # Rows that `first` cut off are computed somewhere, too, so that every rank has M.
            rest = leaf[:1].expand(len(self._spread) - len(self), *leaf.shape[1:])
            own[name] = self._spread.mine(torch.cat([leaf, rest]))
        return self._again(self._spread.local.at_rows(own))

    def _again(self, local: GradStack) -> GradStack:
        ranks = self._spread.ranks
        spread = SpreadRows(local, ranks, ranks.gather(per_row(local)))
        return self._like_this(spread, self.scale, self._count)

    def release(self) -> None:
        """Let go of whatever can be computed, or exchanged, again."""
        self._spread.release()
