"""Batches, one after the other: indexed on the device, or loaded by other processes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from gradfilter.lab._usage import check
from gradfilter.lab.data._augment import Augment
from gradfilter.lab.data._images import on_device
from gradfilter.lab.data._loader import raw_batches
from gradfilter.lab.data._samples import Samples


def batches(
    samples: Samples,
    indices: Tensor | Sequence[Tensor],
    *,
    workers: int = 0,
    augment: Augment | None = None,
    seed: int = 0,
    first_step: int = 0,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Normalised images and the labels to train on, step by step, on the device.

    The same bits for every number of workers and wherever the images are kept; no random numbers
    are taken from anybody. Workers end with the iterator: let it run out, or close it.

    Args:
        samples: A split.
        indices: (steps, N) int64, or a row for each step.
        workers: Processes that load images which are not on the device.
        augment: Applied to raw pixels; `augmentation` gives it.
        seed: Of the augmentation.
        first_step: The training's step of the first row, which the augmentation depends on.

    Yields:
        x (N, channels, height, width), y (N,)

    Examples:
        >>> from gradfilter.lab.data._load import load_data
        >>> data = load_data("digits", device=torch.device("cpu"))
        >>> [(x.shape, y) for x, y in batches(data.train, torch.tensor([[5, 0]]))]
        [(torch.Size([2, 1, 8, 8]), tensor([8, 0]))]
    """
    images, device = samples.images, samples.labels.device
    rows = list(indices)
    # A table of indices goes there in one piece.
    there = list(on_device(indices, device) if isinstance(indices, Tensor) else indices)
    with closing(raw_batches(images, there if images.resident else rows, workers)) as loaded:
        for step, (raw, row) in enumerate(zip(loaded, there, strict=True), first_step):
            seen = raw if augment is None else augment(raw, seed, step)
            yield images.normalise(seen), samples.labels[on_device(row, device)]


def in_order(
    samples: Samples, size: int, *, workers: int = 0, start: int = 0, stop: int | None = None
) -> Generator[tuple[Tensor, slice], None, None]:
    """All samples in order, as they are, in chunks of ``size``; the last one may be smaller.

    Args:
        samples: A split, which may be empty.
        size: At least 1.
        workers: As in `batches`.
        start: The first sample.
        stop: The sample after the last; None for all.

    Yields:
        x (<= size, channels, height, width), and where they are: ``samples.clean[where]``.

    Examples:
        >>> from gradfilter.lab.data._load import load_data
        >>> data = load_data("digits", device=torch.device("cpu"))
        >>> [(len(x), where) for x, where in in_order(data.test, 300)]
        [(300, slice(0, 300, None)), (240, slice(300, 540, None))]
    """
    check(size >= 1, "--batch-size", "at least 1", size, "500 is usual for evaluation.")
    stop = len(samples) if stop is None else min(stop, len(samples))
    parts = [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
    rows = [torch.arange(part.start, part.stop) for part in parts]
    with closing(raw_batches(samples.images, rows, workers)) as loaded:
        for raw, part in zip(loaded, parts, strict=True):
            yield samples.images.normalise(raw), part
