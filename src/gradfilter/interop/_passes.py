"""One ordinary pass of a model, and what is asked of parameters and gradients in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree


def forward_backward(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    scaler: torch.amp.GradScaler | None,
) -> Callable[[], tuple[Any, Tensor]]:
    """A closure: ``loss_fn(model(inputs), targets)`` and its backward pass."""

    def closure() -> tuple[Any, Tensor]:
        predictions = model(inputs)
        loss = loss_fn(predictions, targets)
        scaled = loss if scaler is None else scaler.scale(loss)
        with _tree.no_autocast(loss):  # torch wants autocast around forward passes only
            torch.autograd.backward(scaled)
        return predictions, loss

    return closure


def tensors_of(params: Iterable[Any]) -> list[Tensor]:
    """Tensors among parameters in any form torch.optim takes: groups, pairs with names."""
    found = []
    for item in params:
        if isinstance(item, dict):
            own = item["params"]
            found += [own] if isinstance(own, Tensor) else tensors_of(own)
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def all_finite(params: list[Tensor]) -> bool:
    """Whether no gradient has Inf or NaN; asks the host."""
    grads = [p.grad for p in params if p.grad is not None]
    return all(bool(g.isfinite().all()) for g in grads)
