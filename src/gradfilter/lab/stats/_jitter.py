"""Copies of images in slightly other colours."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter.lab.stats._draws import uniform

COPIES = 4
LOW, HIGH = 0.99, 1.01
LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in a grey image."""


def jittered(images: Tensor, ids: Tensor, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """Four copies of every image, with another brightness, contrast and saturation each.

    In raw colours r = x · std + mean, one after the other: r ← b r; r ← c r + (1 − c) grey mean of
    the image; r ← s r + (1 − s) grey image, with b, c, s from U[0.99, 1.01]. After each, colours
    stay in [0, 1], or in the image's own range where that is wider. Images without three channels
    have no saturation; their grey is the mean of the channels.

    Args:
        images: Normalised. (N, c, h, w)
        ids: The factors belong to these samples. (N,)
        mean: Of the normalisation. (c, 1, 1)
        std: The same. (c, 1, 1)
        seed: Of the factors.

    Returns:
        Normalised. (4, N, c, h, w)
    """
    raw = images * std + mean
    bounds = raw.flatten(1).aminmax(dim=1)
    low = bounds.min.clamp(max=0)[:, None, None, None]
    high = bounds.max.clamp(min=1)[:, None, None, None]
    factors = uniform(seed, "jitter", ids, (COPIES, 3), LOW, HIGH).to(raw)  # (N, 4, 3)
    copies = []
    for j in range(COPIES):
        brightness, contrast, saturation = factors[:, j, :, None, None, None].unbind(1)
        copy = (raw * brightness).clamp(low, high)
        copy = torch.lerp(grey(copy).mean((1, 2, 3), keepdim=True), copy, contrast)
        copy = copy.clamp(low, high)
        if raw.shape[1] == len(LUMA):
            copy = torch.lerp(grey(copy), copy, saturation).clamp(low, high)
        copies.append((copy - mean) / std)
    return torch.stack(copies)


def grey(raw: Tensor) -> Tensor:
    """The brightness of every pixel. (N, c, h, w) -> (N, 1, h, w)."""
    if raw.shape[1] != len(LUMA):
        return raw.mean(1, keepdim=True)
    return (raw * raw.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
