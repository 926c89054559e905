"""Whether all ranks hold the same leaves and as many rows, said before anything is exchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from gradfilter.distributed._ranks import Ranks
from gradfilter.distributed._spread import SpreadRows, per_row
from gradfilter.grads._again import AgainStack
from gradfilter.grads._dense import DenseStack
from gradfilter.grads._stack import GradStack

ROWS = 32
"""Rows per rank of which a message between CPUs also brings what there is one number of."""


def met(stack: GradStack, ranks: Ranks, keep: Tensor | bool | None = None) -> SpreadRows:
    """The rows of all ranks, once every rank knows that they are rows of one matrix.

    Args:
        stack: The local rows.
        ranks: Who gives some.
        keep: False where this rank would skip the step; None if nobody asks.

    Raises:
        ValueError: Number of rows, leaves, their order, shapes or dtypes differ; it names two
            ranks and the difference.
    """
    text, own = _described(stack, keep is not None), per_row(stack, True if keep is None else keep)
    few = own.device.type == "cpu" and len(stack) <= ROWS
    # Of one length whatever there is to say, or ranks that differ could not even compare.
    message = torch.zeros(3 + 3 * ROWS, dtype=torch.int64)
    message[:3] = torch.tensor([len(stack), _digest(text), len(text)])
    if few:
        message[3 : 3 + own.numel()] = own.flatten().view(torch.int64)
    messages = ranks.gather_on_host(message)
    _check_alike(messages[:, :3].tolist(), text, ranks)
    if not few:
        return SpreadRows(stack, ranks, ranks.gather(own))
    numbers = messages[:, 3 : 3 + own.numel()].contiguous().view(own.dtype)
    return SpreadRows(stack, ranks, numbers.reshape(-1, *own.shape))


def check_leaves_alike(params: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Refuse, on every rank, parameters whose names, order, shapes or dtypes differ between ranks.

    Raises:
        ValueError: They do; it names two ranks and the difference.
    """
    text = _described(DenseStack({name: p.detach()[None] for name, p in params.items()}), False)
    note = torch.tensor([1, _digest(text), len(text)])
    _check_alike(ranks.gather_on_host(note).tolist(), text, ranks)


def _digest(text: bytes) -> int:
    return int.from_bytes(sha256(text).digest()[:8], signed=True)


def _check_alike(notes: list[list[int]], text: bytes, ranks: Ranks) -> None:
    """Compare (number of rows, digest, length of the text); all ranks read the same notes."""
    for rank, note in enumerate(notes):
        if note[0] != notes[0][0]:
            raise ValueError(
                f"RankStack: expected as many rows on every rank, found {notes[0][0]} on rank "
                f"{ranks.name(0)} and {note[0]} on rank {ranks.name(rank)}. Give all "
                "ranks batches of one size; drop_last=True in the DataLoader leaves out a last "
                "one that is smaller."
            )
    other = next((rank for rank, note in enumerate(notes) if note[1] != notes[0][1]), None)
    if other is not None:
        # Sent by all ranks, also those that agree: a gathering is of all or of none.
        longest = max(note[2] for note in notes)
        letters = ranks.gather_on_host(torch.tensor([*text.ljust(longest)], dtype=torch.uint8))
        ours, theirs = (json.loads(bytes(letters[rank].tolist())) for rank in (0, other))
        raise ValueError(
            "RankStack: expected the same leaves in the same order on every rank, found "
            f"{_difference(ours, theirs, ranks.name(0), ranks.name(other))}."
        )


def _described(stack: GradStack, keeps: bool) -> bytes:
    """Names, shapes and dtypes of the leaves in order, and what else is known of the rows."""
    tensors: Mapping[str, Tensor] = {}
    if isinstance(stack, DenseStack):
        tensors = stack.rows
    elif isinstance(stack, AgainStack) and stack.origin is not None:
        tensors = stack.origin.params
    leaves = [
        [name, list(shape), str(tensors[name].dtype) if name in tensors else "unknown"]
        for name, shape in stack.shapes.items()
    ]
    return json.dumps([*leaves, [stack.losses is not None, keeps]]).encode()


def _difference(ours: list[Any], theirs: list[Any], one: int, other: int) -> str:
    """The first thing in which two ranks differ, and what to do about it, in words."""
    advice = "Build the same model, with the same frozen parameters, on all ranks"
    *ours, known_here = ours
    *theirs, known_there = theirs
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            here, there = (f"{_words(a)} on rank {one}", f"{_words(b)} on rank {other}")
            return f"leaf {place} is {here} and {there}. {advice}"
    if len(ours) != len(theirs):
        return f"{len(ours)} leaves on rank {one} and {len(theirs)} on rank {other}. {advice}"
    what = 0 if known_here[0] != known_there[0] else 1
    here, there = ("known" if known[what] else "unknown" for known in (known_here, known_there))
    found = f"{('losses', 'keep')[what]} {here} on rank {one} and {there} on rank {other}"
    return f"{found}. Give them on all ranks or on none"


def _words(leaf: list[Any]) -> str:
    name, shape, dtype = leaf
    return f"{name!r} of shape {shape} and dtype {dtype}"
