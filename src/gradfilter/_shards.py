"""Access the local parts of sharded tensors (DTensor), and sum numbers over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter._lost_ranks import explained

# --- Tensors ---


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a `torch.distributed.tensor.DTensor`."""
    # This runs for every leaf in every step, and torch.distributed.tensor is slow to import.
    return _is_dtensor(type(tensor))


PLAIN = {Tensor, nn.Parameter}
"""The types of most tensors, which need no further question."""


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether some of the tensors are sharded."""
    kinds = {*map(type, tensors)}  # usually one, and no call of Python for each tensor
    return not kinds <= PLAIN and any(map(_is_dtensor, kinds))


def _is_dtensor(kind: type) -> bool:
    return kind not in PLAIN and hasattr(kind, "placements")


def _is_cut(placement: Any) -> bool:
    """Return whether ranks along a mesh dim hold different pieces, in order or interleaved."""
    # is_shard() is false for the interleaved pieces that FSDP makes from tensor-parallel ones.
    return not (placement.is_replicate() or placement.is_partial())


@dataclass(frozen=True, eq=False)
class ShardPart:
    """The leaves of a tree with the same placement over the ranks, as this rank holds them.

    Attributes:
        leaves: Plain tensors: the leaves themselves, or the local shards.
        like: One of the original leaves, if they are sharded.
    """

    leaves: dict[str, Tensor]
    like: Any = None

    def summed(self, number: Tensor, over: Collection[int] | None = None) -> Tensor:
        """Add up a sum over local leaves over the ranks that hold the other pieces.

        Args:
            number: The sum of this rank, or several sums.
            over: The dims of the mesh to sum over; None for all along which the leaves are cut.
        """
        if self.like is None:
            return number
        from torch.distributed.tensor import DTensor, Partial, Replicate

        over = cuts(self.like) if over is None else over
        spread = [
            Partial() if d in over else Replicate() for d in range(self.like.device_mesh.ndim)
        ]
        return whole(DTensor.from_local(number, self.like.device_mesh, spread, run_check=False))


def parts(tree: Mapping[str, Tensor]) -> Iterator[ShardPart]:
    """Yield the parts of a tree with one placement each; usually there is only one."""
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
    """Return this rank's shard, or a plain tensor itself; refuse unfinished sums of ranks."""
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
    """Return a tensor that is whole on every rank, gathered if it is sharded."""
    if not is_sharded(number):
        plain: Tensor = number
        return plain
    mesh = number.device_mesh
    spread = [dim for dim, p in enumerate(number.placements) if not p.is_replicate()]
    group = mesh.get_group(spread[0]) if spread else None
    with explained("gathering what is sharded", group, among_others=True):
        full: Tensor = number.full_tensor()
    return full


def gather_shards(tensor: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the whole tensor; every rank that holds a piece of it must call this.

    Args:
        tensor: A DTensor.
        dtype: The dtype in which the pieces are sent; None for their own.
    """
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return whole(tensor if dtype in (None, tensor.dtype) else tensor.to(dtype))


def resharded(shard: Tensor, like: Any, dropped: int = 0) -> Tensor:
    """Return a shard as part of a DTensor placed like ``like``, with some first dims less or more.

    Args:
        shard: The piece of this rank.
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
    """Return the placement of a tensor without its first dims."""
    if not (dropped and _is_cut(placement)):
        return placement
    kind, dim = type(placement), placement.dim - dropped
    if placement.is_shard():
        return kind(dim)
    return kind(dim, split_factor=placement.split_factor)


def cuts(tensor: Any) -> dict[int, int]:
    """Map the mesh dims along which a tensor is cut to the dims of the tensor."""
    if not is_sharded(tensor):
        return {}
    return {d: p.dim for d, p in enumerate(tensor.placements) if _is_cut(p)}


def pieces_of(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """Cut a tensor as torch shards it: equal pieces, then a shorter one, then empty ones."""
    found = list(torch.chunk(tensor, count, dim))
    empty = tensor.narrow(dim, 0, 0)
    return found + [empty] * (count - len(found))


def shard_of(leaf: Tensor, like: Any, more: int = 0) -> Tensor:
    """Return this rank's shard of a tensor that is whole on every rank; nothing is sent.

    Args:
        leaf: The tensor, with ``more`` first dims in addition to those of ``like``.
        like: A DTensor to place it like; a plain tensor gives the tensor itself.
        more: The number of first dims.
    """
    if not is_sharded(like):
        return leaf
    mesh = like.device_mesh
    for dim, cut in reversed(cuts(like).items()):
        leaf = pieces_of(leaf, mesh.size(dim), cut + more)[mesh.get_local_rank(dim)]
    return resharded(leaf.contiguous(), like, -more)


# --- Modules ---


def is_shard_hook(hook: Any) -> bool:
    """Return whether a hook of a module is one by which torch.distributed shards or gathers."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole parameters that a pass without backward left; nothing without FSDP2."""
    for module in modules:
        if hasattr(type(module), "_get_fsdp_state"):  # asked of every module in every step
            again: Any = module
            again.reshard()


def kept_gathered(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the parameters that FSDP2 gathers once for forward and backward.

    These are, unless `reshard_after_forward` says otherwise, those of the outermost module.

    Args:
        modules: Every module by its name.
    """
    for prefix, module in modules.items():
        state = fsdp_state(module)
        if state is None:
            continue
        if not getattr(state, "_auto_reshard_after_forward", True):
            return frozenset()
        dot = f"{prefix}." if prefix else ""
        inner = [name for name, m in modules.items() if m is not module and fsdp_state(m)]
        return frozenset(
            dot + name
            for name, _ in module.named_parameters()
            if not any((dot + name).startswith(f"{part}.") for part in inner)
        )
    return frozenset()


def refuse_sharding_options(model: nn.Module) -> None:
    """Refuse a policy of FSDP2 that changes dtypes, which only its own hooks apply.

    Raises:
        ValueError: There is one.
    """
    for name, module in model.named_modules():
        policy = getattr(fsdp_state(module), "_mp_policy", None)
        dtypes = [getattr(policy, key, None) for key in ("param_dtype", "output_dtype")]
        if any(dtypes):
            raise ValueError(
                f"Expected fully_shard without a MixedPrecisionPolicy, found {policy} on module "
                f"{name!r}, whose hooks do not run in a pass over all rows. Use torch.autocast, "
                "which casts a weight before it is gathered, or parameters in that dtype."
            )


def fsdp_state(module: nn.Module) -> Any:
    """Return the state that FSDP2 keeps of a module on which `fully_shard` was called, or None."""
    find: Any = getattr(type(module), "_get_fsdp_state", None)
    return None if find is None else find(module)
