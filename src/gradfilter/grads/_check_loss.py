"""What a loss has to return."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradfilter import _tree


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
            "tensors, which are stacked over the rows."
        )


def check_differentiable(value: Tensor) -> None:
    """Refuse a loss without a gradient."""
    if not value.requires_grad:
        raise unreached()


def check_reaches(value: Tensor, leaves: Iterable[Tensor]) -> None:
    """Refuse a loss whose graph leads to none of the leaves; one of them is enough.

    A loss that uses the parameters of a module instead of those it is given has a gradient, only
    not one of anybody here. The search stops at the first leaf, which is seldom far.
    """
    check_differentiable(value)
    wanted = {id(leaf) for leaf in leaves}
    if value.grad_fn is None:  # the loss is a leaf itself
        if id(value) in wanted:
            return
        raise unreached()
    seen, ahead = {value.grad_fn}, deque([value.grad_fn])
    while ahead:  # breadth first: the last layer's parameters are a few nodes away
        node = ahead.popleft()
        edges = node.next_functions
        if not edges and id(getattr(node, "variable", None)) in wanted:
            return
        for before, _ in edges:
            if before is not None and before not in seen:
                seen.add(before)
                ahead.append(before)
    raise unreached()


def unreached() -> ValueError:
    """What is said of a loss that no parameter has a part in."""
    return ValueError(
        "Expected a loss that depends on the parameters, found one without a gradient with "
        "respect to any of them. Is it detached, computed under no_grad or inference_mode, or are "
        "other parameters used than those passed in? Use params: "
        "torch.func.functional_call(model, params, (x,)), or model_loss(model, criterion)."
    )
