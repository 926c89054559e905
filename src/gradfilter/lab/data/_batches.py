"""Make batches, as a pure function of (seed, step), with augmentation and loader processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._random import Purpose, random_for
from gradfilter.lab.data._samples import Data, Images, Samples, Source, on_device

# --- Epochs: n samples, for every kind of sampling ---


def steps_until(epochs: float, n: int, batch_size: int) -> int:
    """Return the steps until ``epochs`` · n samples are seen: ⌈epochs · n / batch_size⌉.

    Every step counts batch_size samples, so that trainings with one batch size are equally long for
    every number of microbatches and every kind of sampling.

    Args:
        epochs: Number of epochs, at least 0, also a fraction.
        n: Number of samples in the training split.
        batch_size: Number of samples per step.

    Raises:
        UsageError: ``epochs`` is negative or not finite.

    Examples:
        >>> steps_until(2, 1257, 80)  # 2 514 samples: 31 full batches and a partial one
        32
        >>> steps_until(1.1, 10, 1)  # 1.1 · 10 is slightly more than 11 in floating point
        11
    """
    fix = "100 is usual, 0.5 is half an epoch."
    check(isfinite(epochs) and epochs >= 0, "--epochs", "a number of at least 0", epochs, fix)
    # The decimal number that was typed, not its binary rounding.
    return -(-Fraction(str(epochs)) * n // batch_size)


# --- The samples of a step: a pure function of (seed, step), so that a run resumes at any step ---


Order = Callable[[int, int], Tensor]
"""(first step, step after the last) -> indices (steps, N) int64, on the CPU."""


def shuffled(n: int, *, batch_size: int, seed: int) -> Order:
    """Return shuffled batches of full size; samples left at the end of a pass are omitted.

    Pass p has its own permutation, from (seed, p); a pass is ⌊n / batch_size⌋ steps.

    Args:
        n: Number of samples.
        batch_size: N in 1 .. n.
        seed: Seed of the permutations, at least 0.

    Raises:
        UsageError: No batch can be filled.

    Examples:
        >>> indices = shuffled(7, batch_size=3, seed=0)
        >>> indices(0, 2).flatten().unique().numel()  # one pass, which omits one sample
        6
        >>> torch.equal(indices(5, 6)[0], indices(0, 6)[5])  # a pure function of the step
        True
    """
    _check_size(batch_size)
    check(batch_size <= n, "--batch-size", f"at most {n}, the samples", batch_size, "Lower it.")
    return _Shuffled(n, batch_size, seed)


@dataclass(frozen=True)
class _Shuffled:
    """The order of `shuffled`."""

    n: int
    batch_size: int
    seed: int

    def __call__(self, start: int, stop: int) -> Tensor:
        size = self.batch_size
        used = self.n // size * size
        everyone = np.arange(self.n)
        drawn = _rounds(everyone, used, start * size, stop * size, self.seed, "shuffled")
        return torch.from_numpy(drawn).view(-1, size)


def class_balanced(
    labels: Tensor, *, classes: int, microbatches: int, per_class: int, seed: int
) -> Order:
    """Return batches whose microbatches hold ``per_class`` samples of every class.

    Every class visits its own samples in shuffled order, and shuffles again after each round (round
    r of class c from (seed, c, r)). So samples of small classes are seen more often.
    N = M · C · m; microbatch i is entries i·C·m .. (i + 1)·C·m − 1, sorted by class.

    Args:
        labels: The labels that the run trains on. (n,)
        classes: Number of classes, C; labels are 0 .. C − 1.
        microbatches: Number of microbatches, M.
        per_class: Number of samples per class in every microbatch, m.
        seed: Seed of the order, at least 0.

    Raises:
        UsageError: A class has no sample.

    Examples:
        >>> labels = torch.tensor([0, 1, 0, 0, 1])
        >>> indices = class_balanced(labels, classes=2, microbatches=2, per_class=1, seed=0)
        >>> labels[indices(0, 2)]
        tensor([[0, 1, 0, 1],
                [0, 1, 0, 1]])
    """
    _check_size(microbatches, "--microbatches")
    _check_size(per_class, "--samples-per-class")
    host = labels.cpu().numpy()
    members = [np.flatnonzero(host == label) for label in range(classes)]
    for label, own in enumerate(members):
        if not len(own):
            raise UsageError(
                f"--samples-per-class: expected samples of every class, found none of class {label}"
                ". Use less label noise or more data, or omit the option."
            )

    return _ClassBalanced(members, microbatches, per_class, seed)


@dataclass(frozen=True, eq=False)
class _ClassBalanced:
    """The order of `class_balanced`.

    Attributes:
        members: The samples of every class.
        microbatches: Number of microbatches.
        per_class: Number of samples per class in every microbatch.
        seed: Seed of the order.
    """

    members: Sequence[NDArray[np.int64]]
    microbatches: int
    per_class: int
    seed: int

    def __call__(self, start: int, stop: int) -> Tensor:
        per_step = self.microbatches * self.per_class  # of every class
        draws = start * per_step, stop * per_step
        by_class = np.stack(
            [
                _rounds(own, len(own), *draws, self.seed, "balanced", c)
                for c, own in enumerate(self.members)
            ]
        )
        steps = rearrange(by_class, "c (s i m) -> s (i c m)", i=self.microbatches, m=self.per_class)
        return torch.from_numpy(np.ascontiguousarray(steps))


def _rounds(
    members: NDArray[np.int64],
    used: int,
    start: int,
    stop: int,
    seed: int,
    purpose: Purpose,
    *counters: int,
) -> NDArray[np.int64]:
    """Return draws start .. stop − 1 of rounds, each the first ``used`` of a permutation."""
    first, last = start // used, -(-stop // used)
    rounds = [
        random_for(seed, purpose, *counters, r).permutation(members)[:used]
        for r in range(first, last)
    ]
    drawn = np.concatenate([members[:0], *rounds])
    return drawn[start - first * used : stop - first * used]


def _check_size(value: int, option: str = "--batch-size") -> None:
    check(value >= 1, option, "at least 1", value, "1 is the smallest.")


# --- Augmentation of a whole batch on its device; its random numbers come from the CPU ---


Augment = Callable[[Tensor, int, int], Tensor]
"""(raw images (N, channels, height, width), seed, step) -> the same shape and dtype."""

PADDING = 4


def augmentation(
    data: Data, *, flipped_only: bool = False, part: tuple[int, int] = (0, 1)
) -> Augment:
    """Return the augmentation of a data set; see `crop_and_flip`.

    Raises:
        UsageError: Cropping and flipping would change the class of its images.
    """
    fix = "Omit it; natural images can be augmented."
    check(data.augmentable, "--augmentation", f"none for {data.name}", "it", fix)
    return partial(crop_and_flip, flipped_only=flipped_only, part=part)


def crop_and_flip(
    images: Tensor,
    seed: int,
    step: int,
    *,
    flipped_only: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Pad with 4 pixels of 0, crop to the size at random, flip with probability 1/2.

    Applied to raw pixels, before normalisation: the border is black, not the mean colour. A pure
    function of (seed, step) and the batch size, equal on every device.

    Args:
        images: Raw images (N, channels, height, width), any dtype.
        seed: Seed of the augmentation, at least 0.
        step: Training step, at least 0.
        flipped_only: Crop only the images that are flipped, and do not change the others.
        part: (i, k) if these images are the i-th of k equal parts of a batch: they are augmented as
            in the whole batch.
    """
    n, channels, height, width = images.shape
    random = random_for(seed, "augment", step)
    which, parts = part
    draws = random.integers(0, (2 * PADDING + 1, 2 * PADDING + 1, 2), (n * parts, 3))
    draws = draws[which * n : (which + 1) * n]
    if flipped_only:
        draws[draws[:, 2] == 0, :2] = PADDING
    top, left, flip = on_device(torch.from_numpy(draws), images.device).T[:, :, None]  # (N, 1) each
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)  # (N, height)
    columns = left + torch.where(flip == 1, width - 1 - across, across)  # (N, width)
    padded = pad(images, [PADDING] * 4)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None]  # (N, height, width)
    pixels = pixels.flatten(1)[:, None].expand(n, channels, -1)
    # One flat index per pixel is four times as fast on a CPU as one index per dim.
    return padded.flatten(2).gather(2, pixels).view_as(images)


# --- Raw pixels, from the device or from loader processes ---


def raw_batches(
    images: Images, rows: Sequence[Tensor], workers: int
) -> Generator[Tensor, None, None]:
    """Yield raw pixels on the device, one batch per row; resident images need no workers.

    Args:
        images: The images.
        rows: Indices of each batch, (k,) int64.
        workers: Number of processes, at least 0; they end with the generator.

    Raises:
        UsageError: ``workers`` < 0, or an image cannot be read.
    """
    check(workers >= 0, "--workers", "at least 0", workers, "0 loads in the process itself.")
    if images.resident:
        for row in rows:
            yield images.source[on_device(row, images.device)]
        return
    loader: DataLoader[Tensor | str] = DataLoader(
        _Rows(images.source, [row.cpu().numpy() for row in rows]),
        batch_size=None,  # an item is a batch
        num_workers=min(workers, len(rows)),
        worker_init_fn=_ignore_signals,
        pin_memory=images.device.type == "cuda",
        generator=torch.Generator(),  # otherwise it would draw from the global generator
    )
    for loaded in loader:
        if isinstance(loaded, str):
            raise UsageError(loaded)
        yield on_device(loaded, images.device)


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which all processes receive, in a loader process.

    The main process ends its loaders, and they end when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Rows(Dataset[Tensor | str]):
    """Return batch k of a source. Rows are arrays: each tensor would use a file descriptor."""

    source: Source
    rows: Sequence[NDArray[Any]]

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, step: int) -> Tensor | str:
        try:
            return self.source[torch.from_numpy(self.rows[step])]
        except UsageError as error:
            # Returned as a value: an exception would arrive with the traceback of the process.
            return str(error)


# --- The stream of batches ---


def batches(
    samples: Samples,
    indices: Tensor | Sequence[Tensor],
    *,
    workers: int = 0,
    augment: Augment | None = None,
    seed: int = 0,
    first_step: int = 0,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield normalised images and the labels to train on, step by step, on the device.

    Results are bitwise equal for every number of workers and every place of the images, and the
    global random state is not used. Workers end with the iterator: exhaust or close it.

    Args:
        samples: Samples of a split.
        indices: Indices (steps, N) int64, or one row per step.
        workers: Number of processes that load images which are not on the device.
        augment: Augmentation of raw pixels, from `augmentation`.
        seed: Seed of the augmentation.
        first_step: Training step of the first row; the augmentation depends on it.

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
    # A table of indices is copied at once.
    there = list(on_device(indices, device) if isinstance(indices, Tensor) else indices)
    with closing(raw_batches(images, there if images.resident else rows, workers)) as loaded:
        for step, (raw, row) in enumerate(zip(loaded, there, strict=True), first_step):
            seen = raw if augment is None else augment(raw, seed, step)
            yield images.normalise(seen), samples.labels[on_device(row, device)]


def in_order(
    samples: Samples, size: int, *, workers: int = 0, start: int = 0, stop: int | None = None
) -> Generator[tuple[Tensor, slice], None, None]:
    """Yield all samples in order, without augmentation, in chunks of ``size`` or less.

    Args:
        samples: Samples of a split, which may be empty.
        size: Number of samples per chunk, at least 1.
        workers: Number of loader processes, as in `batches`.
        start: Position of the first sample.
        stop: Position after the last sample; None for all.

    Yields:
        x (<= size, channels, height, width), and their positions: ``samples.clean[where]``.

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
