"""The loss a wrapper differentiates, also of a compiled module."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter._shards import is_sharded
from gradfilter._types import Transform
from gradfilter.grads._grad_function import Plan
from gradfilter.grads._loss import ModelLoss, refuse_class, refuse_lazy
from gradfilter.interop._filtered_scaler import scaled_criterion
from gradfilter.interop._module_view import ModuleView, module_of

PREFIX = "_orig_mod."
"""What torch.compile puts in front of every name of the module it wraps."""


def view_of(model: nn.Module, criterion: Callable[..., Any] | None) -> nn.Module:
    """What is differentiated: the module, under its original names, and its criterion's tensors.

    Args:
        model: The module as the user has it, compiled or not.
        criterion: As in `model_loss`.
    """
    original, other = original_of(model), module_of(criterion, model)
    if original is model and other is None:
        return model
    return ModuleView(original, model, None if other is None else original_of(other))


def loss_of(
    view: nn.Module,
    criterion: Callable[..., Any] | None,
    has_aux: bool = False,
    scale: Tensor | None = None,
) -> ModelLoss:
    """The pure loss; with a scale its aux is (loss,) or (loss, aux).

    Args:
        view: Of `view_of`.
        criterion: As in `model_loss`.
        has_aux: The criterion returns (loss, aux).
        scale: () factor of the loss, or None.
    """
    if scale is None:
        return ModelLoss(view, criterion, has_aux, in_place=True)
    return ModelLoss(view, scaled_criterion(criterion, has_aux, scale), True, in_place=True)


def check_order(criterion: Any, transforms: Any, optimizer: Any) -> None:
    """Refuse arguments of which one stands where another belongs.

    Raises:
        TypeError: An optimizer or a chain is somewhere else.
    """
    found = criterion, transforms, optimizer
    wrong = (
        isinstance(criterion, (Transform, torch.optim.Optimizer))
        or isinstance(transforms, torch.optim.Optimizer)
        or isinstance(optimizer, Transform)
    )
    if wrong:
        raise TypeError(
            "Filtered: expected (model, criterion, transforms, optimizer, microbatches) in this "
            f"order, found {', '.join(type(part).__name__ for part in found)} after the model. "
            "Change their places, or name them."
        )


def check_criterion(
    name: str,
    model: nn.Module,
    criterion: Callable[..., Any] | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse a criterion with trainable parameters that the optimizer does not have.

    Args:
        name: Who asks.
        model: Whose own parameters may be trained by others.
        criterion: As in `model_loss`.
        optimizer: What is to train them.

    Raises:
        TypeError: The criterion is a class.
        ValueError: There are such parameters.
    """
    refuse_class(criterion, name)
    other = module_of(criterion, model)
    if other is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known |= {id(p) for p in model.parameters()}
    left = [n for n, p in other.named_parameters() if p.requires_grad and id(p) not in known]
    if left:
        raise ValueError(
            f"{name}: expected the criterion's trainable parameters in the optimizer, found "
            f"{left[0]!r} ({len(left)} in all) that nothing would train. Give the optimizer "
            "[*model.parameters(), *criterion.parameters()], or call "
            "criterion.requires_grad_(False)."
        )


def check_module(name: str, model: Any) -> None:
    """Refuse what is no module, and a wrapper that these backward passes would go around.

    Args:
        name: Who asks.
        model: What the user gave.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}: expected a torch.nn.Module, found {type(model).__name__}. Pass a pure "
            "function to gradfilter.microbatch_grads."
        )
    refuse_lazy(model)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"{name}: expected a module of one rank, found DistributedDataParallel, which averages "
            "over ranks only what its own backward passes compute. Pass its .module, and for the "
            "rows of all ranks put gradfilter.distributed.across_ranks() first in the chain."
        )
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"{name}: expected parameters that are whole on this rank, found sharded ones "
            "(DTensor). Take the rows from gradfilter.distributed.sharded_rows, and let a chain "
            "filter them."
        )


def original_of(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    return model.get_submodule(PREFIX[:-1]) if _is_compiled_module(model) else model


def plan_for(model: nn.Module, criterion: Callable[..., Any] | None, plan: Plan) -> Plan:
    """The plan a module allows: under vmap torch runs compiled code uncompiled, or not at all.

    Raises:
        ValueError: A compiled module and a plan that needs vmap.
    """
    if plan == "loop" or not has_compiled(model, criterion):
        return plan
    why = "torch runs no compiled module under vmap, so that its rows take M backward passes"
    if plan != "auto":
        raise ValueError(
            f'Filtered: expected plan "loop" (or "auto") for a compiled module, found {plan!r}: '
            f'{why}. Pass the module as it was before torch.compile to use plan "{plan}".'
        )
    warnings.warn(
        f'Filtered took plan "loop": {why}. Pass the module as it was before torch.compile for '
        'the fused plan, which is usually faster, or plan="loop" to choose this outright.',
        stacklevel=3,
    )
    return "loop"


def has_compiled(model: nn.Module, criterion: Callable[..., Any] | None) -> bool:
    """Whether a module, a part of it, or its criterion is compiled."""
    other = module_of(criterion, model)
    return any(
        _is_compiled_module(m) or getattr(m, "_compiled_call_impl", None) is not None
        for part in (model, other)
        if part is not None
        for m in part.modules()
    )


def _is_compiled_module(module: nn.Module) -> bool:
    # Whoever compiled a module has imported the compiler; others should not wait for that.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
