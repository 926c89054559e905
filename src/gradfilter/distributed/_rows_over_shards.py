"""The rows of all ranks over parameters that are sharded over the same ranks.

Every rank computes the rows of its own samples, with parameters that it gathers layer by layer. A
sum of rows goes back the same way: each layer's sum is added up over the ranks and cut into shards
as soon as it is there, so that no rank holds the sum of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _products
from gradfilter._shards import cuts, is_sharded, local, pieces_of, resharded, shard_of
from gradfilter._types import Tree
from gradfilter.distributed._gathered_rows import GatheredRows
from gradfilter.distributed._ranks import Ranks, exchanged, reduced
from gradfilter.grads.fused._along import held
from gradfilter.grads.fused._factors import Factor, OuterFactor, ghost_between
from gradfilter.grads.fused._fused_stack import FusedStack

# --- From a sum on every rank to the shards of the sum over the ranks ---


@dataclass(frozen=True, eq=False)
class ShardSums:
    """Adds up a tensor of the size of a parameter over the ranks that hold rows.

    Attributes:
        ranks: The ranks that hold rows.
        params: The parameters, DTensors or whole on every rank, by name.
    """

    ranks: Ranks
    params: Mapping[str, Any]

    def __call__(self, name: str, total: Tensor) -> Tensor:
        """Return this rank's shard of the sum over the ranks, a DTensor placed as the parameter."""
        like = self.params[name]
        if not is_sharded(like):
            return self.ranks.total(total)
        mesh, cut = like.device_mesh, cuts(like)
        groups = [Ranks.of(mesh.get_group(dim)) for dim in range(mesh.ndim)]
        summed = self._dims_of_rows(name, groups)
        for dim in reversed(range(mesh.ndim)):  # as torch cuts: the last dim of the mesh first
            if dim in cut:
                pieces = pieces_of(total, groups[dim].size, cut[dim])
                summing = dim in summed and groups[dim].size > 1
                total = groups[dim].sum_of_pieces(pieces) if summing else pieces[groups[dim].rank]
        for dim in summed - cut.keys():
            total = groups[dim].total(total)
        if not summed:  # each rank that holds rows has all shards together with others
            total = self.ranks.total(total)
        assert total.shape == local(like).shape
        return resharded(total, like)

    def _dims_of_rows(self, name: str, groups: list[Ranks]) -> set[int]:
        """Find the dims of the mesh along which ranks hold other rows."""
        if self.ranks.size == 1:
            return set()
        members = self.ranks.members()
        found = {
            dim for dim, group in enumerate(groups) if group.size > 1 and group.members() <= members
        }
        if prod(groups[dim].size for dim in found) not in (1, len(members)):
            raise ValueError(
                f"across_ranks: expected the ranks with other samples to be those of whole dims of "
                f"the parameters' mesh, found {sorted(members)} and {name!r} on "
                f"{self.params[name].device_mesh}. Pass the group of the dims that FSDP shards "
                "and replicates along: across_ranks(mesh.get_group(...)), or none for all ranks."
            )
        return found


# --- The rows ---


@dataclass(eq=False)
class RowsOverShards(GatheredRows):
    """W times M rows, M of them here, over sharded parameters. All methods are collectives.

    Of P parameters, a layer's P_l, a rank sends in addition to what the pass gathers:

        gram:                 the smaller, per layer, of M·P_l (W − 1)/W numbers, and the layer's
                              inputs and output gradients to every other rank
        combine:              P (W − 1)/W numbers
        dot:                  P (W − 1)/W, and M to every other rank
        sq_norms:             M to every other rank
        reduce_columns:       M·P (W − 1)/W, and P (W − 1)/W

    Sums are DTensors, placed as the parameters.
    """

    _fused: FusedStack = field(init=False)
    _sums: ShardSums = field(init=False)

    def __post_init__(self) -> None:
        """Remember how each parameter is sharded."""
        assert isinstance(self.local, FusedStack)
        self._fused = self.local
        self._sums = ShardSums(self.ranks, held(self.local.origin.params))

    @override
    def gram(self) -> Tensor:
        """Compute J Jᵀ, with the same bits on every rank. (M·W, M·W)."""
        if self._gram is None:
            grams = self._fused.each(self._gram_of).values()
            own = torch.stack(list(grams)).sum(0)
            self._gram = self.ranks.total(own)
            self._gram.diagonal().clamp_(min=0)  # signed terms that cancel
        return self._gram.clone()

    def _gram_of(self, factor: Factor, name: str) -> Tensor:
        """Return this rank's part of the Gram of a leaf; the parts of all ranks add up to it."""
        size, count = self.ranks.size, factor.count
        if isinstance(factor, OuterFactor) and _factors_are_smaller(factor, size):
            return self._gram_of_factors(factor)
        rows = factor.rows().reshape(count, -1)
        (bucket,) = exchanged({name: rows}, self.ranks)
        return _products.inner(bucket.shard, bucket.shard)

    def _gram_of_factors(self, factor: OuterFactor) -> Tensor:
        """Compute the products of the own rows with all, from inputs and output gradients."""
        inputs, outputs = (self.ranks.gather(t) for t in (factor.inputs, factor.outputs))
        rank, count = self.ranks.rank, factor.count
        blocks = [
            ghost_between(factor, OuterFactor(a, d, factor.shape))
            for a, d in zip(inputs, outputs, strict=True)
        ]
        own = torch.cat(blocks, 1)
        part = own.new_zeros(count * self.ranks.size, own.shape[1])
        part[rank * count : (rank + 1) * count] = own
        return part

    @override
    def combine(self, weights: Tensor) -> Tree:
        """Compute wᵀ J for weights (M·W,); the leaves are DTensors placed as the parameters."""
        return self._fused.combine_into(self.local_part(weights.detach()), self._sums)

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        return self._fused.sum_squares_into(self.local_part(weights.detach()), self._sums)

    @override
    def stacked(self, choose: Callable[[Tensor], Tensor]) -> Tree:
        """Return ``choose`` of all rows of each leaf, each rank its shard of them, as DTensors."""

        def own_shard(factor: Factor, name: str) -> Tensor:
            rows = self.ranks.gather(factor.rows()).flatten(0, 1)
            return shard_of(choose(rows), self._sums.params[name], 1)

        return self._fused.each(own_shard)

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        def reduce(factor: Factor, name: str) -> Tensor:
            buckets = exchanged({name: factor.rows()}, self.ranks)
            return shard_of(reduced(buckets, function, self.ranks)[name], self._sums.params[name])

        return self._fused.each(reduce)


def _factors_are_smaller(factor: OuterFactor, ranks: int) -> bool:
    """Return whether a rank sends less if it sends inputs and output gradients to all others."""
    n, (d, p) = factor.inputs.shape[1], (factor.inputs.shape[2], factor.outputs.shape[2])
    return n * (p + d) * ranks < p * d
