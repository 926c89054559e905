"""Estimate the largest eigenvalue and the trace of matrices from products with vectors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from gradfilter import _tree

# --- Random vectors that depend on a seed only, not on device or batch ---


Seeds = SupportsIndex | Sequence[SupportsIndex] | Tensor


def normals(seeds: Seeds, like: Tensor) -> Tensor:
    """Draw standard normal numbers like ``like`` (N, D), with row i from the seed of sample i."""
    return next(_random_vectors(seeds, like, signs=False))


def signs(seeds: Seeds, like: Tensor) -> Iterator[Tensor]:
    """Yield an endless sequence of probes of ±1 in the shape of ``like`` (N, D)."""
    return _random_vectors(seeds, like, signs=True)


def _random_vectors(seeds: Seeds, like: Tensor, *, signs: bool) -> Iterator[Tensor]:
    count, size = like.shape
    to_list = getattr(seeds, "tolist", None)  # of torch, or of NumPy
    if to_list is not None:
        seeds = to_list()
    if isinstance(seeds, SupportsIndex):
        each = [operator.index(seeds)]  # the same numbers for every sample
    else:
        each = [int(seed) for seed in seeds]
        if len(each) != count:
            raise ValueError(
                f"Expected `seed` as one number, or {count} of them, one per sample, found "
                f"{len(each)}."
            )
    # Draw on the CPU, because a GPU's generators give other numbers.
    generators = [torch.Generator().manual_seed(seed) for seed in each]
    while True:
        rows = []
        for generator in generators:
            if signs:
                rows.append(2.0 * torch.randint(2, (size,), generator=generator) - 1)
            else:
                rows.append(torch.randn(size, generator=generator, dtype=torch.float64))
        yield torch.stack(rows).to(like).expand(count, -1)


# --- The trace ---


def trace(
    product: Callable[[Tensor], Tensor], like: Tensor, *, probes: int, seeds: Seeds
) -> tuple[Tensor, Tensor]:
    """Compute mean and standard error of vᵀ A v over random v of ±1; exact if not more costly.

    Args:
        product: (N, D) -> (N, D), each row times the matrix of its sample.
        like: A tensor (N, D) for shape, dtype and device.
        probes: The number of probes, at least 2.
        seeds: One seed, or one per sample.

    Returns:
        The traces and their standard errors, both (N,), float64.
    """
    size = like.shape[1]
    exact = probes >= size
    vectors = _units(like) if exact else islice(signs(seeds, like), probes)
    wide = _tree.sum_dtype(like)
    found = torch.stack([(v * product(v)).sum(1, dtype=wide) for v in vectors])  # (probes, N)
    if exact:
        return found.sum(0), torch.zeros_like(found[0])
    return found.mean(0), found.std(0) / probes**0.5


def _units(like: Tensor) -> Iterator[Tensor]:
    """Yield the unit vectors, each for all samples."""
    for index in range(like.shape[1]):
        unit = torch.zeros_like(like)
        unit[:, index] = 1
        yield unit


# --- The largest eigenvalue by Lanczos iteration ---


class Top(NamedTuple):
    """The largest eigenvalues, and the residuals of their vectors. Both (N,)."""

    values: Tensor
    residuals: Tensor


def top_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int,
    tolerance: float,
) -> Top:
    """Run the Lanczos method for N matrices at a time, with reorthogonalisation.

    After k products the value is the largest in the space of v, A v, .., A^(k-1) v, so it is never
    below the result of k power iterations. The value of a sample is fixed when its own residual
    ‖A u − θ u‖ / max |θ_j| falls below the tolerance, so it does not depend on other samples. If it
    does not fall below, the latest value is the result. A sample with numbers that are not finite
    has NaN.

    Args:
        product: (N, D) -> (N, D), each row times the matrix of its sample.
        start: Random vectors (N, D); their dtype is that of all stored vectors.
        iterations: The largest number of products, >= 1. D are enough.
        tolerance: The relative residual at which a sample is finished, at least 0.
    """
    wide, (count, size) = _tree.sum_dtype(start), start.shape
    basis = [_normalized(start)]
    # Rounding in the vectors limits the smallest residual.
    floor = max(tolerance, 10 * torch.finfo(start.dtype).eps)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    values = torch.zeros(count, dtype=wide, device=start.device)
    residuals = torch.full_like(values, torch.inf)
    done = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(min(iterations, size)):
        vector = product(basis[-1]).to(start.dtype)
        length = _lengths(vector)
        vector = _normalized(vector)
        diagonal.append(length * _dots(basis[-1], vector))
        for _ in range(2):  # one pass leaves a rest from rounding
            for other in basis:
                vector = vector - _dots(other, vector)[:, None].to(start.dtype) * other
        off_diagonal.append(length * _lengths(vector))
        latest, residual = _ritz(diagonal, off_diagonal)
        values = torch.where(done, values, latest)
        residuals = torch.where(done, residuals, residual)
        done = done | (residual <= floor) | residual.isnan()
        if bool(done.all()):  # the host reads this once per product, to save later ones
            break
        basis.append(_normalized(vector))
    return Top(values, residuals)


def _ritz(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue of the tridiagonal matrix, and its relative residual."""
    along, off = torch.stack(diagonal, 1), torch.stack(off_diagonal, 1)  # (N, k)
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
    """Compute inner products of rows of length at most 1, with float64 totals. (N,)."""
    return (a * b).sum(1, dtype=_tree.sum_dtype(a))


def _lengths(vectors: Tensor) -> Tensor:
    """Compute norms of rows, (N,), without squaring small numbers in float32."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=_tree.sum_dtype(vectors))
    return norms


def _normalized(vectors: Tensor) -> Tensor:
    """Scale rows to length 1; a zero row stays zero."""
    norms = _lengths(vectors)
    return (vectors / torch.where(norms > 0, norms, 1.0)[:, None]).to(vectors.dtype)


# --- The largest eigenvalue of J Jᵀ where J is held ---


BLOCK = 2**24
"""The number of elements of J that are in float64 at one time."""


def top_of_gram(rows: Tensor) -> Top:
    """Compute the largest eigenvalue of J Jᵀ for J (N, C', D) in float64; NaN if not finite."""
    gram = _gram(rows)
    finite = gram.isfinite().flatten(1).all(1)
    gram = torch.where(finite[:, None, None], gram, 0.0)  # one NaN would make all fail
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values, u = eigenvalues[:, -1], vectors[:, :, -1:]
    off = torch.linalg.vector_norm((gram @ u)[..., 0] - values[:, None] * u[..., 0], dim=1)
    residuals = torch.where(values > 0, off / torch.where(values > 0, values, 1.0), off)
    return Top(torch.where(finite, values, torch.nan), torch.where(finite, residuals, torch.nan))


def _gram(rows: Tensor) -> Tensor:
    """Compute J Jᵀ of every sample, (N, C', C')."""
    each = max(1, BLOCK // max(1, rows[0].numel()))
    blocks = (block.to(_tree.sum_dtype(rows)) for block in torch.split(rows, each))
    with _tree.no_autocast(rows):
        return torch.cat([block @ block.mT for block in blocks])
