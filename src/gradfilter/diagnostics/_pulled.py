"""Rows of the Jacobian, pulled back through one forward pass chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._cotangents import Normalization, all_rows, cotangents, scaled
from gradfilter.diagnostics._derivative import Derivative

Maker = Callable[[Tensor], Tensor]
"""From classes (c, N) to cotangents of the logits (c, N, C)."""


def sq_norms(at: Derivative, make: Maker, rows: Tensor, size: int) -> Tensor:
    """Squared Frobenius norms, totals in float64. (N,)."""
    wide = _tree.wide(at.x)
    total = torch.zeros(len(at.x), dtype=wide, device=at.x.device)
    for some in torch.split(rows, size):
        u, sizes = scaled(make(some))
        chunk = at.pull(u)
        norms = torch.linalg.vector_norm(chunk, dim=tuple(range(2, chunk.ndim)), dtype=wide)
        total += (sizes * norms).square().sum(0)
    return total


def held(at: Derivative, make: Maker, rows: Tensor, size: int) -> Tensor:
    """All the rows. (N, C', *shape)."""
    x = at.x
    # Filled in place: stacking the rows would hold them twice.
    jacobian = torch.empty((len(x), len(rows), *x.shape[1:]), dtype=x.dtype, device=x.device)
    for start in range(0, len(rows), size):
        chunk = at.pull(make(rows[start : start + size]))
        jacobian[:, start : start + len(chunk)] = rearrange(chunk, "c n ... -> n c ...")
    return jacobian


def held_jacobian(at: Derivative, normalization: Normalization, rows: Tensor, size: int) -> Tensor:
    """The chosen rows of A J, or of J / ‖J‖_F. (N, C', *shape)."""
    make = partial(cotangents, at.logits, normalization)
    if normalization != "jacobian":
        return held(at, make, rows, size)
    jacobian = held(at, make, all_rows(at.logits), size)
    wide = _tree.wide(at.x)
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=wide) for each in jacobian])
    if len(rows) < jacobian.shape[1]:
        jacobian = jacobian[torch.arange(len(jacobian), device=rows.device), rows[0]][:, None]
    for each, norm in zip(jacobian, norms, strict=True):  # in place, one sample wide at a time
        each.copy_(each.to(wide) / torch.where(norm == 0, 1.0, norm))
    return jacobian


def jacobian_norms(at: Derivative, normalization: Normalization, rows: Tensor, size: int) -> Tensor:
    """Frobenius norms of the same, with the rows of one chunk in memory. (N,)."""
    make = partial(cotangents, at.logits, normalization)
    own = sq_norms(at, make, rows, size).sqrt()
    if normalization != "jacobian":
        return own
    return over(own, own if len(rows) > 1 else whole_norms(at, size))


def whole_norms(at: Derivative, size: int) -> Tensor:
    """‖J‖_F of the logits. (N,)."""
    make = partial(cotangents, at.logits, "none")
    return sq_norms(at, make, all_rows(at.logits), size).sqrt()


def over(values: Tensor, norms: Tensor) -> Tensor:
    """Values relative to the norm of what they belong to, 0 where that is 0."""
    return torch.where(norms == 0, 0.0, values / norms)
