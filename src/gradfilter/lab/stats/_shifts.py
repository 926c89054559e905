"""Images moved by a few pixels in directions around the circle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradfilter.lab.stats._scale import scaled


def shift_offsets(radius: int, directions: int) -> list[tuple[int, int]]:
    """Whole pixels, down and to the right, of the points on a circle.

    Direction k is the angle 2πk/K: (round(r sin 2πk/K), round(r cos 2πk/K)).

    Args:
        radius: In pixels.
        directions: K >= 1.

    Examples:
        >>> shift_offsets(4, 8)
        [(0, 4), (3, 3), (4, 0), (3, -3), (0, -4), (-3, -3), (-4, 0), (-3, 3)]
    """
    return [
        (_nearest(radius * math.sin(angle)), _nearest(radius * math.cos(angle)))
        for angle in (2 * math.pi * k / directions for k in range(directions))
    ]


def _nearest(number: float) -> int:
    # sin(30°) and cos(60°) are both a half, but not to the last bit.
    return round(round(number, 9))


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Images moved by whole pixels; what comes in repeats the edge. (..., h, w).

    Examples:
        >>> moved(torch.tensor([[[1, 2, 3]]]), 0, 1)
        tensor([[[1, 1, 2]]])
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
    return images[..., rows[:, None], columns]


def shift_anchors(images: Tensor, radii: Sequence[int], directions: int) -> Tensor:
    """Every image moved in K directions by each of n radii.

    Args:
        images: (N, c, h, w).
        radii: In pixels of a 32 pixel image, see `scaled`.
        directions: K.

    Returns:
        (K, n, N, c, h, w)
    """
    side = min(images.shape[-2:])
    by_radius = [shift_offsets(scaled(radius, side), directions) for radius in radii]
    return torch.stack(
        [
            torch.stack([moved(images, *offsets[k]) for offsets in by_radius])
            for k in range(directions)
        ]
    )
