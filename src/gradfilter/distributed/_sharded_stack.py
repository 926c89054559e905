"""The stack whose columns, the parameters, are sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter._shards import cuts, parts, resharded
from gradfilter._types import Tree
from gradfilter.grads._checks import check_same_leaves
from gradfilter.grads._dense import DenseStack


@dataclass(frozen=True, eq=False, repr=False)
class ShardedStack(DenseStack):
    """Rows whose leaves are DTensors: gradients of a model under FSDP2 or tensor parallelism.

    Every rank holds its shard of all M rows. The Gram is the sum over ranks of the Gram of their
    shards: one all-reduce of M x M numbers. ``combine`` sends nothing and gives DTensors, sharded
    like the parameters. All ranks ask the same questions in the same order and get the same
    numbers, bit for bit, so links need not know.

    Arguments and attributes are those of `DenseStack`. A leaf of ``rows`` has a leading axis M that
    is not sharded, as `torch.stack` of M gradients gives it; leaves may be sharded in different
    ways, or be plain tensors that are the same on every rank. See `sharded_rows`.

    Raises:
        ValueError: The leaves disagree on M, the leading axis is sharded, or a gradient is an
            unfinished sum (`Partial`).

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> from gradfilter.distributed import ShardedStack
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> grads = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> rows = ShardedStack({"w": distribute_tensor(grads, mesh, [Shard(1)])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> dist.destroy_process_group()
    """

    def __post_init__(self) -> None:
        """Check the leaves, and that M is whole on every rank."""
        super().__post_init__()
        for name, leaf in self.rows.items():
            if 0 in cuts(leaf).values():
                raise ValueError(
                    "ShardedStack: expected the leading axis M whole on every rank, found "
                    f"{name!r} sharded along it. For rows on different ranks use RankStack."
                )
        self._local()

    def gram(self) -> Tensor:
        """K = J Jᵀ, by one all-reduce. (M, M)."""
        return self._summed(lambda stack: stack.gram())

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v for a tree v that is sharded like the rows. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        shards = {name: leaf for part in parts(tree) for name, leaf in part.leaves.items()}
        return self._summed(lambda stack: stack.dot({name: shards[name] for name in stack.rows}))

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows, by one all-reduce. (M,)."""
        return self._summed(lambda stack: stack.sq_norms())

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, shard by shard: DTensors like the parameters."""
        leaves = {n: g for _, stack in self._local() for n, g in stack.combine(weights).items()}
        return {name: resharded(leaves[name], self.rows[name], 1) for name in self.rows}

    def stacked(self) -> Tree:
        """The rows, leaf by leaf: the tensors held, or scaled copies of them."""
        if self.scale is None:
            return super().stacked()
        leaves = {n: g for _, stack in self._local() for n, g in stack.stacked().items()}
        return {name: resharded(leaves[name], self.rows[name]) for name in self.rows}

    def _local(self) -> list[tuple[Callable[[Tensor], Tensor], DenseStack]]:
        """This rank's shards as stacks, and how their numbers are summed over the ranks."""
        self._check_unwritten()
        return [
            (part.summed, DenseStack(part.leaves, scale=self.scale)) for part in parts(self.rows)
        ]

    def _summed(self, question: Callable[[DenseStack], Tensor]) -> Tensor:
        sums = [summed(question(stack)) for summed, stack in self._local()]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
