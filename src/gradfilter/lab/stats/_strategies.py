"""Where around an image a metric is taken, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from gradfilter.lab.stats._shifts import shift_anchors
from gradfilter.lab.stats._svd import svd_anchors

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
