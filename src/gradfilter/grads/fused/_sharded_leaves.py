"""Use parameters that are sharded over ranks, each gathered only while an operation needs it.

A pass over all rows puts a tensor without memory in the place of a sharded parameter. The override
of an operation gathers the value when the operation runs, forward and backward, and lets go of it
at once; inputs and output gradients stay, so that rows are those of this rank's own samples. Every
rank must run the same operations in the same order, as under FSDP itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter._shards import any_sharded, gather_shards, is_sharded


@dataclass(frozen=True, eq=False)
class ShardedLeaf:
    """A parameter of which this rank holds a shard.

    Attributes:
        shards: The parameter, a DTensor without a graph.
        dtype: The dtype of the gathered value.
        held: Keeps the gathered value from its first use to the end of the backward pass if FSDP
            would do so; None if the value is gathered for each use.
    """

    shards: Any
    dtype: torch.dtype
    held: dict[torch.dtype, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole parameter."""
        found: torch.Size = self.shards.shape
        return found

    def to(self, dtype: torch.dtype) -> ShardedLeaf:
        """Return the same parameter, gathered in another dtype."""
        return replace(self, dtype=dtype)

    def gathered(self) -> Tensor:
        """Return the whole parameter; all ranks that hold a shard of it must do so."""
        if self.held is not None and self.dtype in self.held:
            return self.held[self.dtype]
        found = gather_shards(self.shards, self.dtype)
        if self.held is not None:
            self.held[self.dtype] = found
        return found

    def release(self) -> None:
        """Let go of the gathered value."""
        if self.held is not None:
            self.held.clear()


@dataclass(frozen=True)
class ShardedLeaves:
    """The sharded parameters of one pass, by name.

    Attributes:
        leaves: The parameters.
        order: The names in the order of their first uses, which ranks compare.
    """

    leaves: Mapping[str, ShardedLeaf] = field(default_factory=dict)
    order: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: Mapping[str, Any], find_kept: Callable[[], frozenset[str]]
    ) -> ShardedLeaves:
        """Return those among the parameters that are sharded.

        Args:
            params: The parameters.
            find_kept: Returns the names of those that stay gathered from their first use to the
                last. It is called if any are sharded.
        """
        if not any_sharded(params.values()):
            return cls()
        kept = find_kept()
        return cls(
            {
                name: ShardedLeaf(p.detach(), p.dtype, {} if name in kept else None)
                for name, p in params.items()
                if is_sharded(p)
            }
        )

    def used(self, name: str) -> None:
        """Note a use."""
        self.order.setdefault(name)

    def release(self) -> None:
        """Let go of all gathered values."""
        for leaf in self.leaves.values():
            leaf.release()


def without_memory(like: Any, count: int) -> Tensor:
    """Return a tensor (M, *shape) that takes the place of a sharded parameter, all of it NaN."""
    shape = (count, *like.shape)
    nothing = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    return nothing.as_strided(shape, (0,) * len(shape))
