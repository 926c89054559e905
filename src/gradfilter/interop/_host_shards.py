"""Train sharded parameters (FSDP2) in a trainer: what it cannot do, and states in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfilter._shards import cuts, is_sharded, local, reshard, shard_of, whole
from gradfilter.distributed._rank_stack import sum_of_bits
from gradfilter.distributed._ranks import Ranks

# --- Checks before the first step ---


def has_shards(module: nn.Module) -> bool:
    """Return whether parameters are sharded, also if an evaluation has left them whole."""
    reshard(module.modules())
    return any(map(is_sharded, module.parameters()))


class OverShards(NamedTuple):
    """Something that is not possible with parameters that are sharded over ranks.

    Attributes:
        given: True if the user asks for it.
        found: What the user gave, for the error.
        fix: The advice in the error.
    """

    given: bool
    found: str
    fix: str


def check_over_shards(caller: str, options: Iterable[OverShards]) -> None:
    """Refuse, before the first step, what is not possible with sharded parameters.

    Args:
        caller: The beginning of the error.
        options: All of these things.

    Raises:
        ValueError: One of them is given.
    """
    for option in options:
        if option.given:
            raise ValueError(
                f"{caller}: expected parameters that are whole in every process with "
                f"{option.found}, found sharded ones (FSDP2). {option.fix}"
            )


def check_copies_alike(caller: str, module: nn.Module, ranks: Ranks) -> None:
    """Refuse, on every rank, copies of a parameter or a shard that differ between ranks.

    FSDP2 sends nothing when it shards: replicas of HSDP, and parameters that it does not shard,
    have the values that each process gave them.

    Args:
        caller: The beginning of the error.
        module: A module whose parameters are sharded, at least some of them.
        ranks: The ranks that train it.

    Raises:
        ValueError: Copies differ, or a shard is not on the device of its mesh.
    """
    sums, keys = [], []
    for name, p in module.named_parameters():
        place, mesh = "", getattr(p, "device_mesh", None)
        if mesh is not None:
            if p.device.type != mesh.device_type:
                raise ValueError(
                    f"{caller}: expected shards on the device of their mesh, {mesh.device_type}, "
                    f"found {name!r} on {p.device.type}. Switch off the offloading of parameters "
                    "to the CPU (CPUOffloadPolicy, offload_params)."
                )
            of_mesh = sha256(str(mesh.mesh.tolist()).encode()).hexdigest()
            place = f"{of_mesh} {[mesh.get_local_rank(dim) for dim in cuts(p)]}"
        keys.append((place, name))
        sums.append(sum_of_bits(local(p)))
    digests: dict[str, Any] = {}
    numbers = torch.stack(sums).tolist() if sums else []
    for (place, name), number in zip(keys, numbers, strict=True):
        digests.setdefault(place, sha256()).update(f"{name} {number}".encode())
    own = {place: digest.hexdigest() for place, digest in digests.items()}
    first: dict[str, tuple[int, str]] = {}
    for rank, text in enumerate(ranks.gather_texts(json.dumps(own))):
        for place, digest in json.loads(text).items():
            before, expected = first.setdefault(place, (rank, digest))
            if digest != expected:
                kept = "shards of a replica" if place else "parameters that are not sharded"
                raise ValueError(
                    f"{caller}: expected {kept} to be equal on all ranks, found other values on "
                    f"rank {ranks.name(before)} than on rank {ranks.name(rank)}: fully_shard sends "
                    "none. Set one seed on all ranks before the model is made, such as "
                    "seed_everything(0), or load the same weights."
                )


# --- States in checkpoints ---


def whole_states(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat state with whole tensors on the host in place of shards, for a checkpoint.

    Args:
        states: The state on this rank; all ranks call this.
    """
    return {n: whole(leaf).cpu() if is_sharded(leaf) else leaf for n, leaf in states.items()}


def cut_states(states: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a saved state of whole tensors as the shards of this rank.

    Args:
        states: The result of `whole_states`, also of another number of ranks.
        like: The present state.
    """
    found = dict(states)
    for name in states.keys() & like.keys():
        template: Any = like[name]
        saved = states[name]
        fits = isinstance(saved, Tensor) and saved.shape == template.shape
        if is_sharded(template) and fits and not is_sharded(saved):
            found[name] = shard_of(saved.to(template.device), template)
    return found
