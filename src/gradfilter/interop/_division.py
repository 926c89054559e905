"""Whether the batches of a host divide into microbatches, which is known before the first."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader


def check_division(
    who: str, loader: Any, microbatches: int | None, batches: float, size: str, drop: str
) -> None:
    """Refuse a loader with a batch that is going to be cut into microbatches and cannot be.

    Args:
        who: Who asks.
        loader: Looked at if it is a `DataLoader` whose number of samples is known.
        microbatches: M, or None, which divides everything.
        batches: How many of its batches are used before it starts anew, or ends, at most.
        size: What to call the size of a batch.
        drop: How to leave the last batch out.

    Raises:
        ValueError: The size of a batch, or what is left for the last one, is not a multiple of M.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if microbatches is None or not isinstance(loader, DataLoader):
        return
    if not isinstance(sampler, BatchSampler) or not hasattr(sampler.sampler, "__len__"):
        return
    full, last = divmod(len(cast(Sized, sampler.sampler)), sampler.batch_size)
    if full and sampler.batch_size % microbatches:
        raise ValueError(
            f"{who}: expected {size} to be a multiple of microbatches={microbatches}, found "
            f"{sampler.batch_size}. Use {max(sampler.batch_size // microbatches, 1) * microbatches}"
            ", or other microbatches."
        )
    if last % microbatches and not sampler.drop_last and batches > full:
        raise ValueError(
            f"{who}: expected every batch to be a multiple of microbatches={microbatches}, found "
            f"a last one of {last} samples in each epoch. Use {drop}, or as many samples as fill "
            "it."
        )
