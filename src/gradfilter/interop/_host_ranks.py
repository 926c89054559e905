"""Filter the rows of all processes of a trainer as one stack, log and save what belongs to all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._shards import is_sharded
from gradfilter._types import Transform
from gradfilter.distributed._rank_stack import across_ranks
from gradfilter.distributed._ranks import Ranks
from gradfilter.interop._filtered import StepResult
from gradfilter.interop._hosted import ROWS, WEIGHTS, mark_rows
from gradfilter.transforms._chain import chain, names_of

# --- The chain ---


def over_all_ranks(transforms: Transform, ranks: Ranks) -> Transform:
    """Put `across_ranks` in front of a chain that has none, if there is a process group.

    In a trainer each process would otherwise filter its own rows, and the parameters of the
    processes would diverge.

    Args:
        transforms: A chain that takes rows.
        ranks: The processes of the trainer.
    """
    parts = chain(transforms).parts
    if ranks.group is None or any(part.name == "across_ranks" for part in parts):
        return transforms
    return chain(across_ranks(), *parts)


# --- The batches ---


def check_batches(caller: str, ranks: Ranks, batches: float, is_last: bool) -> None:
    """Refuse, on every rank, loaders that end at different batches.

    A rank without a batch would let the others wait for its rows.

    Args:
        caller: The beginning of the error.
        ranks: The processes of the trainer.
        batches: The number of batches of this rank's epoch; infinite if it is unknown.
        is_last: True if this rank makes no step of this epoch after the present batch.

    Raises:
        ValueError: The number of batches differs, or only some ranks have their last one.
    """
    known = int(min(batches, 2**62))
    notes = ranks.gather_on_host(torch.tensor([known, is_last], dtype=torch.int64)).tolist()
    other = next((rank for rank, note in enumerate(notes) if note != notes[0]), None)
    if other is None:
        return
    names = ranks.name(0), ranks.name(other)
    if notes[0][0] != notes[other][0]:
        found = f"{notes[0][0]} on rank {names[0]} and {notes[other][0]} on rank {names[1]}"
    else:
        ended, going = names if notes[0][1] else names[::-1]
        found = f"the last one on rank {ended} but not on rank {going}"
    raise ValueError(
        f"{caller}: expected as many batches in an epoch on every rank, found {found}. Use a "
        "DistributedSampler, let an IterableDataset give every rank as many samples, or set "
        "limit_train_batches to the smallest number of batches."
    )


# --- Buffers ---


def copy_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Copy the buffers of the first rank to all, in one message and without waiting for a device.

    Args:
        module: The module, with the same buffers on all ranks. Sharded ones are left out.
        ranks: The ranks that take part.
    """
    buffers = [buffer.detach() for buffer in module.buffers() if not is_sharded(buffer)]
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


# --- Numbers for a log ---


def logged_over_ranks(caller: str, result: StepResult, ranks: Ranks) -> dict[str, Tensor]:
    """Return ``train_loss`` and the numbers of a step for a logger, over the rows of all ranks.

    They are those of one process with all rows: see `logged`. All are summed by one collective,
    which does not wait for a device.

    Args:
        caller: The beginning of the error.
        result: The step of this rank.
        ranks: The processes of the trainer.

    Raises:
        ValueError: The ranks have numbers of different names; raised on all of them.
    """
    mark_rows(result)
    info, aux = dict(result.info), dict(result.aux or {})
    rows, weights = info.pop(ROWS), aux.pop(WEIGHTS, None)
    dtype = torch.promote_types(result.loss.dtype, torch.float32)
    wide = _tree.sum_dtype(result.loss)
    found = {"train_loss": _sum(result.loss.expand(1), rows.expand(1), wide)}
    for name, value in aux.items():
        found[name] = _sum(value, torch.ones_like(value) if weights is None else weights > 0, wide)
    for name, value in info.items():
        if not value.is_complex():
            found[name] = _sum(value, ~value.isnan(), wide)
    texts = ranks.gather_texts(json.dumps(sorted(found)))
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        ours, theirs = set(json.loads(texts[0])), set(json.loads(texts[other]))
        raise ValueError(
            f"{caller}: expected numbers of the same names on every rank, found "
            f"{sorted(ours - theirs)} on rank {ranks.name(0)} alone and {sorted(theirs - ours)} on "
            f"rank {ranks.name(other)} alone. Log them on all ranks: only the first one writes."
        )
    ordered = sorted(found)  # the losses may log in another order
    sums = ranks.total(torch.stack([found[name] for name in ordered]))
    means = (sums[:, 0] / sums[:, 1]).to(dtype).unbind()
    return dict(zip(ordered, means, strict=True))


def _sum(values: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of values that count, each as often as its count, and the number. (2,)."""
    counts = counts.to(dtype)
    each = torch.where(counts > 0, values.detach().to(dtype), 0.0) * counts
    return torch.stack([each.sum(), counts.sum()])


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


# --- States that differ between ranks ---


def gathered_states(
    transforms: Transform, states: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """Return the states of the transforms before `across_ranks`, of all ranks. (W, *shape).

    They depend on the rows of one rank. All others are equal on all ranks.

    Args:
        transforms: The chain of the host.
        states: Its flat state on this rank.
        ranks: The processes of the trainer, all of which call this.
    """
    names = names_of(transforms.parts)
    if ranks.size == 1 or "across_ranks" not in names:
        return {}
    own = tuple(f"{name}." for name in names[: names.index("across_ranks")])
    return {name: ranks.gather(leaf) for name, leaf in states.items() if name.startswith(own)}


def states_of_rank(
    caller: str, states: Mapping[str, Tensor], gathered: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """Return a saved state as this rank had it.

    Args:
        caller: The beginning of the error.
        states: The flat state of the first rank.
        gathered: The result of `gathered_states` at that moment.
        ranks: The present processes.

    Raises:
        ValueError: The states of the ranks differed, and there are more or fewer ranks now.
    """
    own = dict(states)
    for name, leaf in gathered.items():
        if len(leaf) == ranks.size:
            own[name] = leaf[ranks.rank]
        elif not torch.equal(leaf, leaf[:1].expand_as(leaf)):
            raise ValueError(
                f"{caller}: expected as many processes as those that saved {name!r}, which is "
                f"another on each of them, found {len(leaf)} in the checkpoint and {ranks.size} "
                f"here. Resume with {len(leaf)} processes, or without ckpt_path from the weights."
            )
    return own


def differ(tensors: Mapping[str, Tensor], ranks: Ranks) -> bool:
    """Return, alike on all ranks, whether tensors differ between them."""
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + _bytes(tensor).cpu().numpy().tobytes())
    return len(set(ranks.gather_texts(digest.hexdigest()))) > 1


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor. (n,) uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
