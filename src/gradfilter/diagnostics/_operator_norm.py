"""Compute the largest singular value of the Jacobian of every sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._derivative import Derivative, derivative
from gradfilter.diagnostics._input_checks import Model, at_once, check_at_least, check_one_of
from gradfilter.diagnostics._jacobian import (
    Normalization,
    chosen_rows,
    cotangents,
    divide_or_zero,
    held_jacobian,
    jacobian_norms,
    scaled,
    whole_norms,
)
from gradfilter.diagnostics._spectra import Seeds, Top, normals, top_eigenvalue, top_of_gram

# --- The matrix A as two linear maps, without its C x C numbers ---


Map = Callable[[Tensor], Tensor]


def factor_maps(logits: Tensor, normalization: Normalization, rows: Tensor) -> tuple[Map, Map]:
    """Return functions for A v, v (N, C), and Aᵀ u, u (N, C'), for every sample in a wide dtype.

    With p = softmax f:

        none, jacobian    A = I
        softmax           A u = Aᵀ u = p ∘ (u − ⟨p, u⟩ 1)
        logsoftmax        A v = v − ⟨p, v⟩ 1,    Aᵀ u = u − ⟨1, u⟩ p

    For a confident sample these are differences of nearly equal numbers. As A 1 = 0, the top class
    can be set to v_t = 0 first, and then ⟨p, v⟩ has no large terms. As ⟨1, Aᵀ u⟩ = 0, its entry of
    Aᵀ u is computed from the others.

    Args:
        logits: The logits f, (N, C).
        normalization: The normalisation that A applies.
        rows: The classes (C', N): all, or one per sample, whose row of A is then held.
    """
    if len(rows) == 1:
        row = cotangents(logits, normalization, rows)[0].to(_tree.sum_dtype(logits))
        return lambda v: (row * v).sum(1, keepdim=True), lambda u: row * u
    if normalization in ("none", "jacobian"):
        return _identity, _identity
    p = logits.to(_tree.sum_dtype(logits)).softmax(1)
    top = p.argmax(1, keepdim=True)

    def centred(v: Tensor) -> Tensor:
        v = v - v.gather(1, top)
        return v - (p * v).sum(1, keepdim=True)

    def weighted(u: Tensor) -> Tensor:
        return p * centred(u)

    def balanced(u: Tensor) -> Tensor:
        others = (u - p * u.sum(1, keepdim=True)).scatter(1, top, 0.0)
        return others.scatter(1, top, -others.sum(1, keepdim=True))

    return (weighted, weighted) if normalization == "softmax" else (centred, balanced)


def _identity(v: Tensor) -> Tensor:
    return v


# --- The operator norm ---


Method = Literal["auto", "gram", "power"]

GRAM_UP_TO = 32
"""The number of rows up to which the exact value costs at most about ten products."""


class OperatorNorm(NamedTuple):
    """The result of `operator_norm`.

    Attributes:
        values: σ_max(J) of every sample, (N,).
        residuals: ‖J Jᵀ u − σ² u‖ / σ² for the unit vector u found with it, (N,): the relative
            distance of σ to a singular value is at most half of that.
    """

    values: Tensor
    residuals: Tensor


def operator_norm(
    model: Model,
    x: Tensor,
    *,
    normalization: Normalization = "none",
    targets: Tensor | None = None,
    target_logit_only: bool = False,
    chunk_size: int | None = None,
    method: Method = "auto",
    iterations: int = 50,
    tolerance: float = 1e-4,
    seed: Seeds = 0,
) -> OperatorNorm:
    r"""Return the operator norm of every sample's Jacobian, max ‖J v‖ over ‖v‖ = 1.

    σ² is the largest eigenvalue of K = J Jᵀ, which is only C' x C'.

    ``"gram"`` computes J and K, in float64, and its eigenvalues: exact, C' backward passes, and
    the whole Jacobian in memory. ``"power"`` multiplies a random vector with K repeatedly,
    by one backward pass (Jᵀ u) and one forward pass with tangents (J v) each time, and takes the
    best vector in their span (the Lanczos method), so about ten products suffice. It holds no
    Jacobian. ``"auto"`` is gram up to 32 rows, power beyond.

    Args:
        model: See `input_jacobian`, also for the next five.
        x: (N, *shape).
        normalization: The kind of Jacobian.
        targets: The classes (N,).
        target_logit_only: True for row y only.
        chunk_size: The number of rows of J at a time, if J is computed.
        method: ``"auto"``, ``"gram"`` or ``"power"``.
        iterations: The largest number of products, >= 1, for ``"power"``.
        tolerance: At least 0; a sample is finished when its residual is below that.
        seed: The seed of the first vector: one number, or N, one per sample. A sample's result
            depends on its own seed only, not on the rest of the batch.

    Returns:
        An `OperatorNorm`: values and residuals, both (N,), float64. The empirical Lipschitz
        constant of a data set is √(mean σ²).

    Raises:
        ValueError: The errors of `input_jacobian`; iterations < 1, tolerance < 0, an unknown
            method, or another number of seeds than samples.
        TypeError: The errors of `input_jacobian`.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> w = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> values, residuals = gd.operator_norm(lambda x: x @ w.T, torch.zeros(2, 2))
        >>> values
        tensor([4., 4.], dtype=torch.float64)

    References:
        Gamba, Azizpour, Björkman, "On the Lipschitz Constant of Deep Networks and Double Descent",
        2023, https://arxiv.org/abs/2301.12309
        Golub, Van Loan, "Matrix Computations", 2013, chapter 10.
    """
    check_one_of("method", method, get_args(Method))
    check_at_least("iterations", iterations, 1, "Ten to fifty are usual.")
    check_at_least("tolerance", tolerance, 0, "1e-4 is usual.")
    at = derivative(model, x)
    rows = chosen_rows(at.logits, normalization, targets, target_logit_only)
    size = at_once(chunk_size, len(x), x.device)
    if method == "gram" or (method == "auto" and len(rows) <= GRAM_UP_TO):
        if len(rows) == 1:  # its norm is not rounded to the dtype of x
            norms = jacobian_norms(at, normalization, rows, size)
            return OperatorNorm(norms, norms - norms)  # 0, or NaN
        jacobian = held_jacobian(at, normalization, rows, size)
        return OperatorNorm(*_roots(top_of_gram(jacobian.flatten(2))))
    start = normals(seed, at.logits.new_empty((len(x), len(rows)), dtype=_tree.sum_dtype(x)))
    product = partial(_product, at, *factor_maps(at.logits, normalization, rows))
    top = top_eigenvalue(product, start, iterations=iterations, tolerance=tolerance)
    values, residuals = _roots(top)
    if normalization == "jacobian":
        values = divide_or_zero(values, whole_norms(at, size))
    return OperatorNorm(values, residuals)


def _product(at: Derivative, forth: Map, back: Map, u: Tensor) -> Tensor:
    """Compute A J Jᵀ Aᵀ u for u (N, C'), with ``forth`` A v and ``back`` Aᵀ u."""
    down, size_down = scaled(back(u))
    v = at.pull(down[None])[0]
    # Use v of length 1, because the square of a small J underflows in float32.
    size = torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=u.dtype)
    scale = torch.where(size > 0, size, 1.0)
    up = at.push((v.flatten(1) / scale[:, None]).to(v.dtype))
    return (size_down * scale)[:, None] * forth(up.to(u.dtype))


def _roots(top: Top) -> tuple[Tensor, Tensor]:
    """Compute singular values of J from eigenvalues of J Jᵀ, which may be negative by rounding."""
    return top.values.clamp(min=0).sqrt(), top.residuals
