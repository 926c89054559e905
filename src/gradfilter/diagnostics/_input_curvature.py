"""The loss as a function of the input: its slope, and its Hessian's trace and top eigenvalue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._derivative import (
    Derivative,
    derivative,
    log_loss,
    plain_attention,
    plain_recurrence,
)
from gradfilter.diagnostics._input_checks import Model, at_once, check_at_least, check_one_of
from gradfilter.diagnostics._jacobian import (
    all_rows,
    chosen_rows,
    collect_rows,
    factor_rows,
    jacobian_norms,
)
from gradfilter.diagnostics._spectra import Seeds, normals, top_eigenvalue, top_of_gram, trace

CurvatureMethod = Literal["hvp", "gauss_newton"]


class InputCurvature(NamedTuple):
    """The result of `loss_curvature`, one number per sample, all (N,).

    Attributes:
        gradient_norms: ‖∇_x ℓ‖.
        traces: tr H.
        trace_errors: The standard error of the trace, 0 if it is exact.
        tops: The largest eigenvalue of H.
        residuals: ‖H u − λ u‖ / max |λ| for the unit vector u found with it.
    """

    gradient_norms: Tensor
    traces: Tensor
    trace_errors: Tensor
    tops: Tensor
    residuals: Tensor


def loss_curvature(
    model: Model,
    x: Tensor,
    targets: Tensor,
    *,
    method: CurvatureMethod = "hvp",
    probes: int = 32,
    iterations: int = 50,
    tolerance: float = 1e-3,
    chunk_size: int | None = None,
    seed: Seeds = 0,
) -> InputCurvature:
    r"""Compute slope and curvature of ℓ = −log p_y in the input, with H = ∂²ℓ/∂x² of every sample.

    ``"hvp"`` multiplies H with vectors: the trace is the mean of vᵀ H v over probes v of ±1
    (Hutchinson), or exact with at least as many probes as numbers in x; the top
    eigenvalue is found by the Lanczos method.

    ``"gauss_newton"`` takes Jᵀ A J with A = diag p − p pᵀ, which is H wherever the logits are
    piecewise linear in x (ReLU, max-pooling), and its part without the curvature of the logits
    elsewhere. With A = B Bᵀ, B = diag √p − p √pᵀ, its eigenvalues are those of the C x C matrix
    (Bᵀ J)(Bᵀ J)ᵀ: exact, C backward passes, and Bᵀ J in memory.

    Args:
        model: A module in evaluation mode or a function x -> logits, as for `input_jacobian`.
        x: (N, *shape), floating point.
        targets: Classes y (N,).
        method: ``"hvp"`` or ``"gauss_newton"``.
        probes: The number of probes, at least 2, for hvp.
        iterations: The largest number of products for the top eigenvalue, >= 1, for hvp.
        tolerance: The relative tolerance, at least 0, for hvp.
        chunk_size: The number of rows of J at a time, for gauss_newton.
        seed: The seed of the random vectors, for hvp: one number, or N, one per sample. A sample's
            result depends on its own seed only, not on the rest of the batch.

    Returns:
        An `InputCurvature`, all (N,), float64.

    Raises:
        ValueError: The errors of `input_jacobian`; probes < 2, iterations < 1, tolerance < 0, an
            unknown method, or another number of seeds than samples.
        TypeError: The errors of `input_jacobian`.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> w = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # p = ½, H = diag(4, 0)
        >>> found = gd.loss_curvature(lambda x: x @ w.T, torch.zeros(1, 2), torch.tensor([0]))
        >>> [round(value.item(), 4) for value in found]
        [2.0, 4.0, 0.0, 4.0, 0.0]

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
        Gamba, Azizpour, Björkman, "On the Lipschitz Constant of Deep Networks and Double Descent",
        2023, https://arxiv.org/abs/2301.12309
    """
    check_one_of("method", method, get_args(CurvatureMethod))
    check_at_least("probes", probes, 2, "Two are needed for a standard error.")
    check_at_least("iterations", iterations, 1, "Ten to fifty are usual.")
    check_at_least("tolerance", tolerance, 0, "1e-3 is usual.")
    at = derivative(model, x)
    rows = chosen_rows(at.logits, "crossentropy", targets, False)
    slopes = jacobian_norms(at, "crossentropy", rows, 1)
    if method == "gauss_newton":
        return _gauss_newton(at, slopes, at_once(chunk_size, len(x), x.device))
    product = _hessian_product(model, at.x, rows[0])
    flat = _tree.at_least_float32(at.x.flatten(1))
    traces, errors = trace(product, flat, probes=probes, seeds=seed)
    start = normals(seed, flat)
    tops = top_eigenvalue(product, start, iterations=iterations, tolerance=tolerance)
    return InputCurvature(slopes, traces, errors, *tops)


def _gauss_newton(at: Derivative, slopes: Tensor, size: int) -> InputCurvature:
    """Compute trace and top eigenvalue of (Bᵀ J)ᵀ (Bᵀ J)."""
    make = partial(factor_rows, at.logits, "fisher")
    rows = collect_rows(at, make, all_rows(at.logits), size).flatten(2)  # (N, C, D)
    traces = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=_tree.sum_dtype(rows)).square()
    return InputCurvature(slopes, traces, torch.zeros_like(traces), *top_of_gram(rows))


@torch.no_grad()  # no graph of the parameters
def _hessian_product(model: Model, x: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function for H v, v (N, D), for every sample; two passes serve all v."""

    def loss(z: Tensor) -> Tensor:
        logits = model(z)
        return log_loss(logits.to(_tree.sum_dtype(logits)), targets)

    with plain_attention(), plain_recurrence(model, x.device):
        pull = torch.func.vjp(torch.func.grad(loss), x)[1]

    @torch.no_grad()
    def product(v: Tensor) -> Tensor:
        moved: Tensor = pull(v.reshape(x.shape).to(x.dtype))[0]
        return moved.flatten(1).to(v.dtype)

    return product
