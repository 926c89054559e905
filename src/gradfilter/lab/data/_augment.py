"""Augmentation of a whole batch at once, where the images are; its random numbers from the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradfilter.lab._usage import check
from gradfilter.lab.data._images import on_device
from gradfilter.lab.data._random import random_for
from gradfilter.lab.data._samples import Data

Augment = Callable[[Tensor, int, int], Tensor]
"""(raw images (N, channels, height, width), seed, step) -> the same shape and dtype."""

PADDING = 4


def augmentation(
    data: Data, *, flipped_only: bool = False, part: tuple[int, int] = (0, 1)
) -> Augment:
    """How this data set is augmented; see `crop_and_flip`.

    Raises:
        UsageError: Cropping and flipping would make other things of its images.
    """
    fix = "Leave it out; natural images can be augmented."
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
    """Pad with 4 pixels of 0, crop back to the size at random, flip every second one on average.

    On raw pixels, before normalisation: what comes in at the border is black, not the mean colour.
    A pure function of (seed, step) and the batch size, the same on every device.

    Args:
        images: (N, channels, height, width), any dtype.
        seed: At least 0.
        step: At least 0, the step of the training.
        flipped_only: Crop only the images that are flipped, and leave the others as they are.
        part: (i, k) where these images are the i-th of k equal parts of a batch: they are then
            augmented as they would be in the whole.
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
    # One flat index per pixel: four times as fast on a CPU as an index per dim.
    return padded.flatten(2).gather(2, pixels).view_as(images)
