"""Points around an image at which a metric is taken: shifts, and images without singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

# --- Strengths are defined for images of 32 pixels and scaled for others ---


NAMED_FOR = 32


def scaled(strength: int, side: int) -> int:
    """A strength in pixels, or in singular values, of an image of another side; at least 1.

    strength · side / 32, rounded to the nearest integer (half to even). A strength that rounds to
    nothing would give back the image, so 1 is the least: at 8 pixels both 1 and 4 pixels are 1.

    Args:
        strength: At 32 pixels, >= 1.
        side: The smaller one of the image's sides.

    Examples:
        >>> [scaled(4, side) for side in (8, 32, 64)]
        [1, 4, 8]
    """
    return max(1, round(strength * side / NAMED_FOR))


# --- Images shifted by a few pixels in directions around the circle ---


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


# --- Images without some of their singular values ---


def svd_window(strength: int, direction: int, values: int) -> tuple[int, int]:
    """The singular values that are zeroed, [l − s − i, l − i) of the l in falling order.

    Strength s and direction i are counted in singular values of a 32 pixel image; for another one
    both are multiplied by l/32 and rounded (half to even), s to at least 1. Directions are then no
    longer all different where l < 32. What would lie before the first value is left out.

    Args:
        strength: s >= 1, at 32 pixels.
        direction: i >= 0.
        values: l, the smaller side of the image.

    Examples:
        >>> svd_window(5, 0, 32), svd_window(25, 7, 32), svd_window(25, 7, 8)
        ((27, 32), (0, 25), (0, 6))
    """
    end = max(0, values - round(direction * values / NAMED_FOR))
    return max(0, end - scaled(strength, values)), end


def svd_anchors(images: Tensor, strengths: Sequence[int], directions: int) -> Tensor:
    """Every image, channel by channel, without the singular values of K x n windows.

    Args:
        images: (N, c, h, w), decomposed in float32 or wider.
        strengths: n of them, see `svd_window`.
        directions: K.

    Returns:
        (K, n, N, c, h, w)
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    scaled_left = left * values[..., None, :]

    def without(strength: int, direction: int) -> Tensor:
        start, end = svd_window(strength, direction, values.shape[-1])
        # Taking the window's part away changes nothing else; adding up the rest would round.
        part = scaled_left[..., start:end] @ right[..., start:end, :]
        kept: Tensor = wide - part
        return kept.to(images.dtype)

    return torch.stack([torch.stack([without(s, i) for s in strengths]) for i in range(directions)])


# --- Strategies by name ---


StrategyName = Literal[
    "none",
    "1px-shifts",
    "4px-shifts",
    "shifts-path",
    "svd-5",
    "svd-10",
    "svd-15",
    "svd-20",
    "svd-22",
    "svd-25",
    "svd-path",
]
SHIFTS = {"1px-shifts": (1,), "4px-shifts": (4,), "shifts-path": (1, 2, 3, 4)}
SVD_STRENGTHS = (5, 10, 15, 20, 22, 25)

Anchors = Callable[[Tensor], Tensor]
"""Images (N, c, h, w) -> anchors (K, n, N, c, h, w); a pure function, image by image."""


def strategy(name: StrategyName, directions: int = 8) -> Anchors | None:
    """How the anchors of images are made; None where the images themselves are all there is.

    Args:
        name: One of ``StrategyName``; a path has n > 1 anchors in each direction.
        directions: K >= 1.

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


def is_path(name: StrategyName) -> bool:
    """Whether the anchors of a direction lie one behind the other."""
    return name.endswith("-path")


STRATEGIES: tuple[str, ...] = get_args(StrategyName)
