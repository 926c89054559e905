"""Filter the rows of all processes of a trainer as one stack, and keep the processes alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from gradfilter._types import Transform, Tree
from gradfilter.distributed._rank_stack import across_ranks
from gradfilter.distributed._ranks import Ranks, added_up
from gradfilter.transforms._chain import chain


def over_all_ranks(transforms: Transform, size: int) -> Transform:
    """Put `across_ranks` in front of a chain that has none, if there are several processes.

    In a trainer each process would otherwise filter its own rows, and the parameters of the
    processes would diverge.

    Args:
        transforms: A chain that takes rows.
        size: The number of processes of the trainer.
    """
    parts = chain(transforms).parts
    if size == 1 or any(part.name == "across_ranks" for part in parts):
        return transforms
    return chain(across_ranks(), *parts)


def mean_over_ranks(tree: Tree, ranks: Ranks) -> Tree:
    """Return the mean of a tree over the ranks, with the same bits on each."""
    return {name: leaf / ranks.size for name, leaf in added_up(tree, ranks).items()}


def copy_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Copy the buffers of the first rank to all, in one message and without waiting for a device.

    Args:
        module: The module, with the same buffers on all ranks.
        ranks: The ranks that take part.
    """
    buffers = [buffer.detach() for buffer in module.buffers()]
    if not buffers:
        return
    # As bytes, the buffers of all dtypes are one message.
    sent = torch.cat([_bytes(b) for b in buffers])
    ranks.copy_first(sent)
    if ranks.is_first:
        return
    sizes = [b.numel() * b.element_size() for b in buffers]
    for buffer, part in zip(buffers, sent.split_with_sizes(sizes), strict=True):
        # A part may begin anywhere, but a view as another dtype may not.
        buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def averaged(numbers: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Return the mean of each number over the ranks that have it, the same on all ranks."""
    names = [json.loads(text) for text in ranks.gather_texts(json.dumps(list(numbers)))]
    union = list(dict.fromkeys(name for own in names for name in own))
    own = torch.tensor([numbers.get(name, 0.0) for name in union], dtype=torch.float64)
    found = ranks.gather_on_host(own)
    means = {}
    for place, name in enumerate(union):
        known = torch.tensor([name in of_rank for of_rank in names])
        means[name] = found[known, place].mean().item()
    return means


def differ(tensors: Mapping[str, Tensor], ranks: Ranks) -> bool:
    """Return, alike on all ranks, whether tensors differ between them."""
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + _bytes(tensor).cpu().numpy().tobytes())
    return len(set(ranks.gather_texts(digest.hexdigest()))) > 1


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor. (n,) uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
