"""Tensors sharded over ranks (DTensor): their local parts, and numbers summed over all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`."""
    # Asked of every leaf in every step, and torch.distributed.tensor is slow to import.
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def _is_cut(placement: Any) -> bool:
    """Whether ranks along a dim of the mesh hold different pieces, in order or interleaved."""
    # is_shard() denies it of the interleaved pieces that FSDP makes of tensor-parallel ones.
    return not (placement.is_replicate() or placement.is_partial())


@dataclass(frozen=True, eq=False)
class ShardPart:
    """The leaves of a tree that lie alike over the ranks, as this rank has them.

    Attributes:
        leaves: Plain tensors: the leaves themselves, or the local shards.
        like: One of the leaves as it was, if they are sharded.
    """

    leaves: dict[str, Tensor]
    like: Any = None

    def summed(self, number: Tensor, over: Collection[int] | None = None) -> Tensor:
        """A sum over the numbers in local leaves, summed over the ranks that hold others.

        Args:
            number: The sum of this rank, or several.
            over: The dims of the mesh to sum over; None for all that cut the leaves up.
        """
        if self.like is None:
            return number
        from torch.distributed.tensor import DTensor, Partial, Replicate

        over = cuts(self.like) if over is None else over
        spread = [
            Partial() if d in over else Replicate() for d in range(self.like.device_mesh.ndim)
        ]
        whole: Tensor = DTensor.from_local(
            number, self.like.device_mesh, spread, run_check=False
        ).full_tensor()
        return whole


def parts(tree: Mapping[str, Tensor]) -> Iterator[ShardPart]:
    """A tree as parts, each of which is summed over the ranks in its own way; one as a rule."""
    if not any(is_sharded(leaf) for leaf in tree.values()):
        yield ShardPart(dict(tree))
        return
    found: dict[Any, ShardPart] = {}
    for name, leaf in tree.items():
        sharded: Any = leaf if is_sharded(leaf) else None
        key = None if sharded is None else (sharded.device_mesh, sharded.placements)
        part = found.setdefault(key, ShardPart({}, sharded))
        part.leaves[name] = local(leaf)
    yield from found.values()


def local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor, or a plain one itself; refuses unfinished sums of ranks."""
    if not is_sharded(tensor):
        plain: Tensor = tensor
        return plain
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            f"Expected tensors that are sharded or replicated over the ranks, found placements "
            f"{tensor.placements}. Call redistribute() first."
        )
    with torch.no_grad():
        shard: Tensor = tensor.to_local()
    return shard


def whole(number: Any) -> Tensor:
    """A number taken from sharded tensors, the same on every rank; a plain one as it is."""
    full: Tensor = number.full_tensor() if is_sharded(number) else number
    return full


def resharded(shard: Tensor, like: Any, dropped: int = 0) -> Tensor:
    """A shard as part of a DTensor that lies as ``like``, less some first dims or behind new ones.

    Args:
        shard: What this rank has of it.
        like: A DTensor; a plain tensor gives the shard itself.
        dropped: Number of first dims of ``like`` that the shard lacks; negative for new ones.
    """
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    placements = [_without(p, dropped) for p in like.placements]
    shape = like.shape[dropped:] if dropped >= 0 else shard.shape[:-dropped] + like.shape
    whole: Tensor = DTensor.from_local(
        shard,
        like.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole


def _without(placement: Any, dropped: int) -> Any:
    """How a tensor lies without its first dims."""
    if not (dropped and _is_cut(placement)):
        return placement
    kind, dim = type(placement), placement.dim - dropped
    if placement.is_shard():
        return kind(dim)
    return kind(dim, split_factor=placement.split_factor)


def cuts(tensor: Any) -> dict[int, int]:
    """The dims of the mesh among whose ranks a tensor is cut up, and along which of its dims."""
    if not is_sharded(tensor):
        return {}
    return {d: p.dim for d, p in enumerate(tensor.placements) if _is_cut(p)}
