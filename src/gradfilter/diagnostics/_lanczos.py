"""The largest eigenvalue of symmetric matrices that are known by their products only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradfilter import _tree


class Top(NamedTuple):
    """Largest eigenvalues, and how far from eigenvectors their vectors are. Both (N,)."""

    values: Tensor
    residuals: Tensor


def top_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
) -> Top:
    """Lanczos for N matrices at a time, reorthogonalised.

    After k products the value is the largest in the space of v, A v, .., A^(k-1) v, so it is never
    below what k power iterations give. A sample's value stays as it was when its own residual
    ‖A u − θ u‖ / max |θ_j| came below the tolerance: it does not depend on its neighbours. Without
    that, the latest value is the result. A sample with numbers that are not finite has NaN.

    Args:
        product: (N, D) -> (N, D), each row times the matrix of its sample.
        start: (N, D), random; also the dtype in which the vectors are kept.
        iterations: Products at most, >= 1. D are enough.
        tolerance: At least 0.
    """
    wide, (count, size) = _tree.wide(start), start.shape
    basis = [_normalized(start)]
    # Rounding in the vectors bounds what a residual can come down to.
    floor = max(tolerance, 10 * torch.finfo(start.dtype).eps)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    values = torch.zeros(count, dtype=wide, device=start.device)
    residuals = torch.full_like(values, torch.inf)
    done = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(min(iterations, size)):
        vector = product(basis[-1]).to(start.dtype)
        length = _lengths(vector)
        vector = _normalized(vector)
        diagonal.append(length * _dots(basis[-1], vector))
        for _ in range(2):  # once leaves behind what rounding lets back in
            for other in basis:
                vector = vector - _dots(other, vector)[:, None].to(start.dtype) * other
        beside.append(length * _lengths(vector))
        latest, residual = _ritz(diagonal, beside)
        values = torch.where(done, values, latest)
        residuals = torch.where(done, residuals, residual)
        done = done | (residual <= floor) | residual.isnan()
        if bool(done.all()):  # the host looks, once per product, to save all further ones
            break
        basis.append(_normalized(vector))
    return Top(values, residuals)


def _ritz(diagonal: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of the tridiagonal matrix, and its relative residual."""
    along, off = torch.stack(diagonal, 1), torch.stack(beside, 1)  # (N, k)
    finite = (along.isfinite() & off.isfinite()).all(1)
    along, off = torch.where(finite[:, None], along, 0.0), torch.where(finite[:, None], off, 0.0)
    matrix = torch.diag_embed(along)
    matrix = matrix + torch.diag_embed(off[:, :-1], 1) + torch.diag_embed(off[:, :-1], -1)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    scale = eigenvalues.abs().amax(1)
    residual = off[:, -1] * vectors[:, -1, -1].abs()
    residual = torch.where(scale == 0, residual, residual / torch.where(scale == 0, 1.0, scale))
    return (
        torch.where(finite, eigenvalues[:, -1], torch.nan),
        torch.where(finite, residual, torch.nan),
    )


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows of length 1 at most, totals in float64. (N,)."""
    return (a * b).sum(1, dtype=_tree.wide(a))


def _lengths(vectors: Tensor) -> Tensor:
    """Norms of rows, (N,). In float32 the square of a small one is 0."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=_tree.wide(vectors))
    return norms


def _normalized(vectors: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    norms = _lengths(vectors)
    return (vectors / torch.where(norms > 0, norms, 1.0)[:, None]).to(vectors.dtype)
