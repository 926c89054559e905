"""How much the loss rises at the worst point nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._types import Params, Tree
from gradfilter.diagnostics._checks import check_at_least
from gradfilter.diagnostics._loss_at import LossAt
from gradfilter.grads._ambient import Ambient

DELTA = 1e-12  # keeps a zero gradient finite


def sharpness(
    loss: Callable[..., Any],
    params: Params,
    batch: Any,
    rho: float = 0.05,
    *,
    buffers: Tree | None = None,
) -> Tensor:
    r"""The rise of the loss over one SAM step, f(w + e) − f(w) with e = ρ g / (‖g‖ + 1e-12).

    g = ∇f(w), the norm over all parameters together. One gradient and one more forward pass, on
    the same random numbers. In half precision w + e would be rounded, mostly to w, so the
    parameters have to be float32 or wider; autocast may compute in half precision.

    Args:
        loss: What `gradfilter.model_loss` makes, or a plain ``loss(params, batch) -> scalar``.
        params: ``dict[str, Tensor]``, as `gradfilter.extract` gives. They are not changed.
        batch: What the loss takes.
        rho: ρ >= 0, in units of the parameters' norm; 0.05 is usual.
        buffers: For a module's loss; None takes the module's own.

    Returns:
        (), float64.

    Raises:
        ValueError: rho < 0; a parameter is in half precision; the loss does not depend on the
            parameters or is no scalar.
        TypeError: The loss returns no tensor.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> loss = lambda params, batch: (params["w"] ** 2).sum()
        >>> gd.sharpness(loss, {"w": torch.tensor([3.0, 4.0])}, None, rho=1.0)  # 6² − 5²
        tensor(11., dtype=torch.float64)

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", 2021, https://arxiv.org/abs/2010.01412
    """
    check_at_least("rho", rho, 0, "0.05 is usual.")
    at = LossAt.of(loss, batch, buffers)
    device = _tree.device_of(params)
    _check_precision(params)
    # Both passes draw the same numbers and find the same modules, and nothing outside notices.
    moment = Ambient.now(device, at.loss.modules)
    with moment.again():
        value, gradient, _ = at.gradient(params)
    with moment.again(), torch.no_grad():
        step = rho / (_products.norm(gradient) + DELTA)
        near = {
            name: (p + step * gradient[name]).to(p.dtype)  # of shape () it is promoted
            for name, p in params.items()
        }
        return (at.value(near).to(step.dtype) - value.detach().to(step.dtype)).detach()


def _check_precision(params: Params) -> None:
    """Refuse parameters on which the step would be lost."""
    for name, p in params.items():
        if torch.promote_types(p.dtype, torch.float32) != p.dtype:
            raise ValueError(
                f"Expected parameters in float32 or wider, found {name!r} in {p.dtype}, where a "
                "step to a point nearby is mostly rounded away. Use float32 parameters, and "
                "torch.autocast to compute in half precision."
            )
