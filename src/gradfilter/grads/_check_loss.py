"""What a loss has to return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradfilter import _tree


class RefusedByAll(ValueError):
    """A loss that no plan can differentiate: none is tried after the one that found out."""


def split_aux(result: Any) -> tuple[Any, Any]:
    """What a loss returned that promised ``(loss, aux)``.

    Raises:
        TypeError: It is not a pair.
    """
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise TypeError(
            f"Expected a pair (loss, aux) with has_aux=True, found {type(result).__name__}{size}. "
            "Return the loss first, and everything else as one tree of tensors."
        )
    return result[0], result[1]


def check_value(value: Any, aux: Any) -> None:
    """Refuse a loss that is no scalar tensor, and an aux that is no tree of tensors."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected the loss to be a scalar tensor, found {type(value).__name__}. A loss that "
            "returns (scalar, aux) needs has_aux=True."
        )
    if value.ndim:
        raise ValueError(
            f"Expected a scalar loss per microbatch, found shape {tuple(value.shape)}. Average "
            'over the samples: a criterion with reduction="none" needs .mean().'
        )
    strangers = [] if aux is None else [x for x in _tree.leaves(aux) if not isinstance(x, Tensor)]
    if strangers:
        raise TypeError(
            f"Expected aux as a tree of tensors, found {type(strangers[0]).__name__}. Return "
            "tensors, without .item(), which are stacked over the rows."
        )


def check_differentiable(value: Tensor) -> None:
    """Refuse a loss without a gradient."""
    if not value.requires_grad:
        raise unreached()


def unreached() -> ValueError:
    """What is said of a loss that no parameter has a part in."""
    return ValueError(
        "Expected a loss that depends on the parameters, found one without a gradient with "
        "respect to any of them. Is it detached, computed under no_grad or inference_mode, or are "
        "other parameters used than those passed in? Use params: "
        "torch.func.functional_call(model, params, (x,)), or model_loss(model, criterion)."
    )
