"""Strengths are named for images of 32 pixels; others have their own."""

from __future__ import annotations

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
