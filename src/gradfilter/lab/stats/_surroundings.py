"""Compute points around an image: shifted images, and images without some singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from gradfilter.lab.stats._stats_config import StrategyName

# --- Strengths are defined for images of 32 pixels and scaled for others ---


NAMED_FOR = 32


def scaled(strength: int, side: int) -> int:
    """Scale a strength in pixels, or in singular values, to the side of an image; at least 1.

    strength · side / 32, rounded to the nearest integer (half to even). A strength of 0 would
    return the image itself, so the minimum is 1: at 8 pixels, the strengths 1 and 4 are both 1.

    Args:
        strength: Strength at 32 pixels, >= 1.
        side: The smaller side of the image.

    Examples:
        >>> [scaled(4, side) for side in (8, 32, 64)]
        [1, 4, 8]
    """
    return max(1, round(strength * side / NAMED_FOR))


# --- Images shifted by a few pixels in directions around the circle ---


def shift_offsets(radius: int, directions: int) -> list[tuple[int, int]]:
    """Return points on a circle, in whole pixels down and to the right.

    Direction k is the angle 2πk/K: (round(r sin 2πk/K), round(r cos 2πk/K)).

    Args:
        radius: Radius in pixels.
        directions: Number of directions, K >= 1.

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
    """Shift images by whole pixels; the edge is repeated. (..., h, w).

    Examples:
        >>> moved(torch.tensor([[[1, 2, 3]]]), 0, 1)
        tensor([[[1, 1, 2]]])
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp(0, width - 1)
    return images[..., rows[:, None], columns]


def shift_anchors(images: Tensor, radii: Sequence[int], directions: int) -> Tensor:
    """Shift every image in K directions by each of n radii.

    Args:
        images: Images. (N, c, h, w)
        radii: Radii in pixels of a 32 pixel image, see `scaled`.
        directions: Number of directions, K.

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


# --- Images without some of their singular values ---


def svd_window(strength: int, direction: int, values: int) -> tuple[int, int]:
    """Return the range of singular values to zero, [l − s − i, l − i) of l in falling order.

    Strength s and direction i are counted in singular values of a 32 pixel image; for another one
    both are multiplied by l/32 and rounded (half to even), s to at least 1. Directions are then no
    longer all different where l < 32. The part of the range before the first value is omitted.

    Args:
        strength: Strength at 32 pixels, s >= 1.
        direction: Index of the direction, i >= 0.
        values: Number of singular values, l, the smaller side of the image.

    Examples:
        >>> svd_window(5, 0, 32), svd_window(25, 7, 32), svd_window(25, 7, 8)
        ((27, 32), (0, 25), (0, 6))
    """
    end = max(0, values - round(direction * values / NAMED_FOR))
    return max(0, end - scaled(strength, values)), end


def svd_anchors(images: Tensor, strengths: Sequence[int], directions: int) -> Tensor:
    """Remove the singular values of K x n windows from every image, channel by channel.

    Args:
        images: Images (N, c, h, w), decomposed in float32 or wider.
        strengths: n strengths, see `svd_window`.
        directions: Number of directions, K.

    Returns:
        (K, n, N, c, h, w)
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    scaled_left = left * values[..., None, :]
    anchors = images.new_empty((directions, len(strengths), *images.shape))
    for direction in range(directions):
        for place, strength in enumerate(strengths):
            start, end = svd_window(strength, direction, values.shape[-1])
            # Subtracting the window is exact for the rest; summing the rest would round.
            anchors[direction, place] = (
                wide - scaled_left[..., start:end] @ right[..., start:end, :]
            )
    return anchors


# --- Strategies by name ---


SHIFTS = {"1px-shifts": (1,), "4px-shifts": (4,), "shifts-path": (1, 2, 3, 4)}
SVD_STRENGTHS = (5, 10, 15, 20, 22, 25)

Anchors = Callable[[Tensor], Tensor]
"""Images (N, c, h, w) -> anchors (K, n, N, c, h, w); a pure function, image by image."""


def strategy(name: StrategyName, directions: int = 8) -> Anchors | None:
    """Return the function that computes anchors of images; None for the images themselves.

    Args:
        name: One of ``StrategyName``; a path has n > 1 anchors in each direction.
        directions: Number of directions, K >= 1.

    Examples:
        >>> import torch
        >>> strategy("svd-path", 8)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([8, 6, 2, 3, 32, 32])
    """
    if name == "none":
        return None
    if name in SHIFTS:
        return partial(shift_anchors, radii=SHIFTS[name], directions=directions)
    strengths = SVD_STRENGTHS if name == "svd-path" else (int(name.removeprefix("svd-")),)
    return partial(svd_anchors, strengths=strengths, directions=directions)


STRATEGIES: tuple[str, ...] = get_args(StrategyName)
