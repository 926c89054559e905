"""Tensors sharded over ranks (DTensor): their local parts, and numbers summed over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`."""
    # Asked of every leaf in every step, and torch.distributed.tensor is slow to import.
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


@dataclass(frozen=True, eq=False)
class Part:
    """The leaves of a tree that lie alike over the ranks, as this rank has them.

    Attributes:
        leaves: Plain tensors: the leaves themselves, or the local shards.
        like: One of the leaves as it was, if they are sharded.
    """

    leaves: dict[str, Tensor]
    like: Any = None

    def summed(self, number: Tensor) -> Tensor:
        """A sum over the numbers in local leaves, summed over all ranks that hold others."""
        if self.like is None:
            return number
        from torch.distributed.tensor import DTensor, Partial, Replicate

        spread = [Partial() if p.is_shard() else Replicate() for p in self.like.placements]
        whole: Tensor = DTensor.from_local(
            number, self.like.device_mesh, spread, run_check=False
        ).full_tensor()
        return whole


def parts(tree: Mapping[str, Tensor]) -> Iterator[Part]:
    """A tree as parts, each of which is summed over the ranks in its own way; one as a rule."""
    if not any(is_sharded(leaf) for leaf in tree.values()):
        yield Part(dict(tree))
        return
    found: dict[Any, Part] = {}
    for name, leaf in tree.items():
        sharded: Any = leaf if is_sharded(leaf) else None
        key = None if sharded is None else (sharded.device_mesh, sharded.placements)
        part = found.setdefault(key, Part({}, sharded))
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
    """A shard as part of a DTensor that lies as ``like`` does without its first dims.

    Args:
        shard: What this rank has of it.
        like: A DTensor; a plain tensor gives the shard itself.
        dropped: Dims of ``like`` that the shard is without.
    """
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(p.dim - dropped) if p.is_shard() else p for p in like.placements]
    shape = like.shape[dropped:]
    whole: Tensor = DTensor.from_local(
        shard,
        like.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole


def sharded_dims(tensor: Any) -> set[int]:
    """The dims along which a tensor is cut up among ranks."""
    return {p.dim for p in tensor.placements if p.is_shard()} if is_sharded(tensor) else set()
