"""Every normalisation is a matrix A in front of one and the same Jacobian of the logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._checks import check_one_of, check_targets

Normalization = Literal["none", "softmax", "logsoftmax", "crossentropy", "jacobian"]
Factor = Literal["none", "softmax", "logsoftmax", "fisher"]
NAMES = get_args(Normalization)


def chosen_rows(
    logits: Tensor,
    normalization: Normalization,
    targets: Tensor | None,
    target_logit_only: bool,
) -> Tensor:
    """Which rows of the Jacobian are asked for: one class per row and sample. (C', N)."""
    check_one_of("normalization", normalization, NAMES)
    if normalization == "crossentropy" or target_logit_only:
        if targets is None:
            why = "crossentropy" if normalization == "crossentropy" else "target_logit_only"
            raise ValueError(f"Expected `targets` with {why}, found None. Pass classes (N,).")
        check_targets(targets, logits)
        return targets.to(logits.device, torch.int64)[None]
    return all_rows(logits)


def all_rows(logits: Tensor) -> Tensor:
    """Every class, for every sample. (C, N)."""
    count, classes = logits.shape
    return torch.arange(classes, device=logits.device)[:, None].expand(-1, count)


def cotangents(logits: Tensor, normalization: Normalization, rows: Tensor) -> Tensor:
    """Rows of A, to be pulled back through the logits.

    none, jacobian: e_k. logsoftmax: e_k − p. softmax: p_k (e_k − p). crossentropy: p − e_y.

    Args:
        logits: (N, C).
        normalization: What A normalises.
        rows: Classes k, (c, N).

    Returns:
        (c, N, C), wide: of a confident sample they may be too small for the logits' dtype. Unit
        rows are in that dtype.
    """
    if normalization in ("none", "jacobian"):
        return factor_rows(logits, "none", rows)
    if normalization == "crossentropy":  # ℓ = −log p_y
        return -factor_rows(logits, "logsoftmax", rows)
    return factor_rows(logits, "softmax" if normalization == "softmax" else "logsoftmax", rows)


def factor_rows(logits: Tensor, factor: Factor, rows: Tensor) -> Tensor:
    """Rows s_k (e_k − p), with s_k = 1 (logsoftmax), p_k (softmax) or √p_k (fisher); or e_k.

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
    """Cotangents (*rest, C) over their largest entry, and that entry's size, wide, (*rest,)."""
    size = cotangents.abs().amax(-1).to(_tree.wide(cotangents))
    size = torch.where(size > 0, size, 1.0)
    return cotangents / size[..., None].to(cotangents.dtype), size


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax p and 1 − p. Both (N, C), wide.

    Of a confident sample 1 − p rounds to 0 at the top class, and with it the whole derivative. The
    sum of the others does not.
    """
    p = logits.to(_tree.wide(logits)).softmax(1)
    top = p.argmax(1, keepdim=True)
    others = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    return p, (1 - p).scatter(1, top, others)
