"""Jacobians of the logits, or of functions of the logits, with respect to the input.

Every normalisation is a matrix A in front of the same Jacobian of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._derivative import Derivative, derivative
from gradfilter.diagnostics._input_checks import Model, at_once, check_one_of, check_targets

# --- Normalisations of the logits, as the matrix A ---


Normalization = Literal["none", "softmax", "logsoftmax", "crossentropy", "jacobian"]
Factor = Literal["none", "softmax", "logsoftmax", "fisher"]
NAMES = get_args(Normalization)


def chosen_rows(
    logits: Tensor,
    normalization: Normalization,
    targets: Tensor | None,
    target_logit_only: bool,
) -> Tensor:
    """Return the requested rows of the Jacobian: one class per row and sample. (C', N)."""
    check_one_of("normalization", normalization, NAMES)
    if normalization == "crossentropy" or target_logit_only:
        if targets is None:
            why = "crossentropy" if normalization == "crossentropy" else "target_logit_only"
            raise ValueError(f"Expected `targets` with {why}, found None. Pass classes (N,).")
        check_targets(targets, logits)
        return targets.to(logits.device, torch.int64)[None]
    return all_rows(logits)


def all_rows(logits: Tensor) -> Tensor:
    """Return all classes for every sample. (C, N)."""
    count, classes = logits.shape
    return torch.arange(classes, device=logits.device)[:, None].expand(-1, count)


def cotangents(logits: Tensor, normalization: Normalization, rows: Tensor) -> Tensor:
    """Compute rows of A, which are pulled back through the logits.

    none, jacobian: e_k. logsoftmax: e_k − p. softmax: p_k (e_k − p). crossentropy: p − e_y.

    Args:
        logits: (N, C).
        normalization: The normalisation that A applies.
        rows: Classes k, (c, N).

    Returns:
        (c, N, C), in a wide dtype, because for confident samples they may be too small for the
        logits' dtype. Unit rows have the logits' dtype.
    """
    if normalization in ("none", "jacobian"):
        return factor_rows(logits, "none", rows)
    if normalization == "crossentropy":  # ℓ = −log p_y
        return -factor_rows(logits, "logsoftmax", rows)
    return factor_rows(logits, "softmax" if normalization == "softmax" else "logsoftmax", rows)


def factor_rows(logits: Tensor, factor: Factor, rows: Tensor) -> Tensor:
    """Compute rows s_k (e_k − p), s_k = 1 (logsoftmax), p_k (softmax) or √p_k (fisher); or e_k.

    The rows of fisher make Bᵀ with B Bᵀ = diag p − p pᵀ, the Hessian of the cross-entropy in the
    logits.
    """
    classes = logits.shape[1]
    if factor == "none":
        unit = torch.zeros(*rows.shape, classes, dtype=logits.dtype, device=logits.device)
        return unit.scatter_(2, rows[..., None], 1.0)
    p, rest = _probabilities(logits)
    own, other = p.gather(1, rows.T).T, rest.gather(1, rows.T).T  # p_k and 1 − p_k, (c, N)
    result = -p.expand(len(rows), -1, -1)
    result = result.scatter(2, rows[..., None], other[..., None])
    if factor == "softmax":
        result = own[..., None] * result
    elif factor == "fisher":
        result = own.sqrt()[..., None] * result
    return result


def scaled(cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Divide cotangents (*rest, C) by their largest entry; return its size, wide, (*rest,)."""
    size = cotangents.abs().amax(-1).to(_tree.sum_dtype(cotangents))
    size = torch.where(size > 0, size, 1.0)
    return cotangents / size[..., None].to(cotangents.dtype), size


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax p and 1 − p. Both (N, C), wide.

    For a confident sample 1 − p rounds to 0 at the top class, and then the whole derivative is 0.
    The sum of the other probabilities does not round to 0.
    """
    p = logits.to(_tree.sum_dtype(logits)).softmax(1)
    top = p.argmax(1, keepdim=True)
    others = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    return p, (1 - p).scatter(1, top, others)


# --- Rows of the Jacobian, computed from one forward pass chunk by chunk ---


Maker = Callable[[Tensor], Tensor]
"""A function from classes (c, N) to cotangents of the logits (c, N, C)."""


def sq_norms(at: Derivative, make: Maker, rows: Tensor, size: int) -> Tensor:
    """Compute squared Frobenius norms, with float64 totals. (N,)."""
    wide = _tree.sum_dtype(at.x)
    total = torch.zeros(len(at.x), dtype=wide, device=at.x.device)
    for some in torch.split(rows, size):
        u, sizes = scaled(make(some))
        chunk = at.pull(u)
        norms = torch.linalg.vector_norm(chunk, dim=tuple(range(2, chunk.ndim)), dtype=wide)
        total += (sizes * norms).square().sum(0)
    return total


def collect_rows(at: Derivative, make: Maker, rows: Tensor, size: int) -> Tensor:
    """Return all the rows. (N, C', *shape)."""
    x = at.x
    # Fill in place, because stacking the rows would hold them twice.
    jacobian = torch.empty((len(x), len(rows), *x.shape[1:]), dtype=x.dtype, device=x.device)
    for start in range(0, len(rows), size):
        chunk = at.pull(make(rows[start : start + size]))
        jacobian[:, start : start + len(chunk)] = rearrange(chunk, "c n ... -> n c ...")
    return jacobian


def held_jacobian(at: Derivative, normalization: Normalization, rows: Tensor, size: int) -> Tensor:
    """Return the chosen rows of A J, or of J / ‖J‖_F. (N, C', *shape)."""
    make = partial(cotangents, at.logits, normalization)
    if normalization != "jacobian":
        return collect_rows(at, make, rows, size)
    jacobian = collect_rows(at, make, all_rows(at.logits), size)
    wide = _tree.sum_dtype(at.x)
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=wide) for each in jacobian])
    if len(rows) < jacobian.shape[1]:
        jacobian = jacobian[torch.arange(len(jacobian), device=rows.device), rows[0]][:, None]
    for each, norm in zip(jacobian, norms, strict=True):  # in place, one sample at a time
        each.copy_(each.to(wide) / torch.where(norm == 0, 1.0, norm))
    return jacobian


def jacobian_norms(at: Derivative, normalization: Normalization, rows: Tensor, size: int) -> Tensor:
    """Compute Frobenius norms of A J, with the rows of one chunk in memory. (N,)."""
    make = partial(cotangents, at.logits, normalization)
    own = sq_norms(at, make, rows, size).sqrt()
    if normalization != "jacobian":
        return own
    return divide_or_zero(own, own if len(rows) > 1 else whole_norms(at, size))


def whole_norms(at: Derivative, size: int) -> Tensor:
    """Compute ‖J‖_F of the logits. (N,)."""
    make = partial(cotangents, at.logits, "none")
    return sq_norms(at, make, all_rows(at.logits), size).sqrt()


def divide_or_zero(values: Tensor, norms: Tensor) -> Tensor:
    """Divide values by norms, with 0 for a norm of 0."""
    return torch.where(norms == 0, 0.0, values / norms)


# --- The public functions ---


def input_jacobian(
    model: Model,
    x: Tensor,
    *,
    normalization: Normalization = "none",
    targets: Tensor | None = None,
    target_logit_only: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return the Jacobian ∂g/∂x of every sample, with g a function of the logits f.

    All of them are A J, with J = ∂f/∂x and p = softmax f:

        none            J
        softmax         (diag p − p pᵀ) J
        logsoftmax      (I − 1 pᵀ) J
        crossentropy    (p − onehot(y))ᵀ J, one row: the gradient of the loss −log p_y
        jacobian        J / ‖J‖_F, and 0 where J is 0

    The rows of A are pulled back through one forward pass over the batch. This costs about 1 + C'
    forward passes, and computes no gradient of a parameter. If only the target's row is requested,
    only that row is computed.

    Args:
        model: A module in evaluation mode, or a function from x (N, *shape) to logits (N, C) that
            treats every sample by itself. It is never changed.
        x: (N, *shape), floating point.
        normalization: One of the names above.
        targets: Classes y (N,), for crossentropy and target_logit_only.
        target_logit_only: True for row y of the matrix above only: C' = 1. (For ``"jacobian"`` it
            is row y of J / ‖J‖_F, which needs all rows.)
        chunk_size: The number of cotangents pulled back at once, >= 1; None chooses by N and
            device. Several are vmapped; with 1, operations that vmap refuses also work.

    Returns:
        (N, C', *shape), in the dtype of x. C' is C, or 1 for crossentropy and target_logit_only.

    Raises:
        ValueError: The model is in training mode; targets are missing, of another shape or not
            classes of the model; logits are not (N, C); an option is unknown.
        TypeError: x is not floating point; targets are not class numbers.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> w = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> gd.input_jacobian(lambda x: x @ w.T, torch.zeros(2, 2)).shape
        torch.Size([2, 3, 2])
        >>> gd.input_jacobian(lambda x: x @ w.T, torch.zeros(1, 2), normalization="softmax")
        tensor([[[ 0.6667, -0.4444],
                 [-0.3333,  0.8889],
                 [-0.3333, -0.4444]]])

    References:
        Novak, Bahri, Abolafia, Pennington, Sohl-Dickstein, "Sensitivity and Generalization in
        Neural Networks: an Empirical Study", 2018, https://arxiv.org/abs/1802.08760
    """
    at = derivative(model, x)
    rows = chosen_rows(at.logits, normalization, targets, target_logit_only)
    return held_jacobian(at, normalization, rows, at_once(chunk_size, len(x), x.device))


def jacobian_norm(
    model: Model,
    x: Tensor,
    *,
    normalization: Normalization = "none",
    targets: Tensor | None = None,
    target_logit_only: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return the Frobenius norm of every sample's Jacobian, ‖∂g/∂x‖_F.

    The squares of each chunk of rows are summed and the rows discarded, so the Jacobian is never
    held. Formulas, arguments and errors are those of `input_jacobian`. For ``"jacobian"`` the norm
    is 1, or 0 where J is 0, and with target_logit_only the share of the target's row.

    Returns:
        (N,), >= 0, float64 (float32 on devices without it).

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> w = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> gd.jacobian_norm(lambda x: x @ w.T, torch.zeros(2, 2))
        tensor([5., 5.], dtype=torch.float64)

    References:
        Novak, Bahri, Abolafia, Pennington, Sohl-Dickstein, "Sensitivity and Generalization in
        Neural Networks: an Empirical Study", 2018, https://arxiv.org/abs/1802.08760
    """
    at = derivative(model, x)
    rows = chosen_rows(at.logits, normalization, targets, target_logit_only)
    return jacobian_norms(at, normalization, rows, at_once(chunk_size, len(x), x.device))
