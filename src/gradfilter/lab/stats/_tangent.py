"""How much a function changes from an image to slightly recoloured copies of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEGACY_SCALE = 0.1


def difference_quotient(
    function: Callable[[Tensor], Tensor], images: Tensor, copies: Tensor, legacy_scale: bool
) -> Tensor:
    """√(mean_j ‖(h(x₀) − h(x_j))/δ_j‖²) with δ_j = ‖x₀ − x_j‖. (N,).

    An image that its copies equal, a black one, has no such number: it is NaN.

    Args:
        function: h, from images to anything (N, ...), sample by sample.
        images: x₀. (N, c, h, w)
        copies: x_1, x_2, ... (copies, N, c, h, w)
        legacy_scale: δ_j = 0.1 for every j instead.
    """
    base = function(images)
    squares = []
    for copy in copies:
        scale: Tensor | float = LEGACY_SCALE
        if not legacy_scale:
            scale = _norm(images - copy)
        squares.append((_norm(base - function(copy)) / scale).square())
    return torch.stack(squares).mean(0).sqrt()


def _norm(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=wide)
    return norms
