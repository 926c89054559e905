"""Loss scaling with torch.amp.GradScaler, by its public methods alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params
from gradfilter.grads._again import AgainStack
from gradfilter.grads._check_loss import split_aux
from gradfilter.grads._loss import _own_loss
from gradfilter.grads._stack import GradStack

LARGEST_SCALE = 2.0**32
"""Beyond this a scale that nothing ever overflows under would overflow the products of rows."""


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """A copy of the present loss scale, or None where no losses are scaled. ()."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device)).detach().clamp(max=LARGEST_SCALE)


def update_scale(scaler: torch.amp.GradScaler, overflow: Tensor) -> None:
    """Tell a scaler whether gradients overflowed, and let it choose its next scale.

    Args:
        scaler: An enabled one.
        overflow: () bool.
    """
    # A scaler learns of overflow only from the gradients of an optimizer: here is one.
    messenger = torch.zeros(1, device=overflow.device)
    messenger.grad = torch.where(overflow, torch.inf, 0.0).reshape(1)
    scaler.unscale_(torch.optim.SGD([messenger], lr=0.0))
    scaler.update()


def scaled_criterion(
    criterion: Callable[..., Any] | None, has_aux: bool, scale: Tensor
) -> Callable[..., Any]:
    """The criterion for ``has_aux``: (scaled loss, (loss,) or (loss, aux)).

    Args:
        criterion: As in `model_loss`.
        has_aux: It returns (loss, aux).
        scale: () factor of the loss.
    """

    def scaled(output: Any, targets: Any) -> tuple[Tensor, tuple[Any, ...]]:
        result = _own_loss(output) if criterion is None else criterion(output, targets)
        loss, *aux = split_aux(result) if has_aux else (result,)
        # A loss in half precision would overflow as soon as it is scaled.
        return _tree.at_least_float32(loss) * scale, (loss, *aux)

    return scaled


def with_own_losses(rows: AgainStack) -> AgainStack:
    """Rows of a `scaled_criterion` whose ``losses`` are not scaled, here and at other parameters.

    The rows themselves stay those of the scaled losses, and ``aux`` is the criterion's own.
    """
    origin = rows.origin
    assert origin is not None  # rows of a batch always have one

    def evaluate(params: Params, per_row: bool, kept: Collection[str]) -> GradStack:
        return with_own_losses(cast(AgainStack, origin.evaluate(params, per_row, kept)))

    again = replace(origin, evaluate=evaluate)
    losses, *aux = rows.aux
    same: AgainStack = replace(
        cast(Any, rows), losses=losses, aux=aux[0] if aux else None, origin=again
    )
    return same
