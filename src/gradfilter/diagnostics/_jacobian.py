"""Jacobians of the logits, or of what is made of them, with respect to the input."""

from __future__ import annotations

from torch import Tensor

from gradfilter.diagnostics._checks import Model, at_once
from gradfilter.diagnostics._cotangents import Normalization, chosen_rows
from gradfilter.diagnostics._derivative import derivative
from gradfilter.diagnostics._pulled import held_jacobian, jacobian_norms


def input_jacobian(
    model: Model,
    x: Tensor,
    *,
    normalization: Normalization = "none",
    targets: Tensor | None = None,
    target_logit_only: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The Jacobian ∂g/∂x of every sample, with g made of the logits f.

    All of them are A J, with J = ∂f/∂x and p = softmax f:

        none            J
        softmax         (diag p − p pᵀ) J
        logsoftmax      (I − 1 pᵀ) J
        crossentropy    (p − onehot(y))ᵀ J, one row: the gradient of the loss −log p_y
        jacobian        J / ‖J‖_F, and 0 where J is 0

    The rows of A are pulled back through one forward pass over the batch: 1 + C' forward passes'
    worth of work, and no gradient of a parameter. Where the target's row only is asked for, that
    is the only one computed.

    Args:
        model: A module in evaluation mode, or a function from x (N, *shape) to logits (N, C) that
            treats every sample by itself. It is never changed.
        x: (N, *shape), floating point.
        normalization: One of the above.
        targets: Classes y (N,), for crossentropy and target_logit_only.
        target_logit_only: Row y only, of the matrix above: C' = 1. (Of ``"jacobian"``, row y of
            J / ‖J‖_F, which takes all rows to know.)
        chunk_size: Cotangents that are pulled back at once, >= 1; None chooses by N and device.
            More than one are vmapped; with 1, operations that cannot be vmapped do.

    Returns:
        (N, C', *shape), in the dtype of x. C' is C, or 1 for crossentropy and target_logit_only.

    Raises:
        ValueError: The model is in training mode; targets are missing, of another shape or not
            classes of the model; logits are not (N, C); an option is unknown.
        TypeError: x is not floating point; targets are no class numbers.

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
    r"""The Frobenius norm of every sample's Jacobian, ‖∂g/∂x‖_F.

    The squares of each chunk of rows are summed and the rows let go, so the Jacobian is never
    held. Formulas, arguments and errors are those of `input_jacobian`; of ``"jacobian"`` the norm
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
