"""Images without some of their singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfilter.lab.stats._scale import NAMED_FOR, scaled


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
