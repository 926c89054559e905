"""The loss a wrapper differentiates, also of a compiled module."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradfilter._types import Params, Tree
from gradfilter.grads._grad_function import Plan
from gradfilter.grads._loss import ModelLoss
from gradfilter.grads._places import Places
from gradfilter.interop._filtered_scaler import scaled_criterion

PREFIX = "_orig_mod."
"""What torch.compile puts in front of every name of the module it wraps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompiledLoss(ModelLoss):
    """The loss of a compiled module under the names of the module it was compiled from."""

    compiled: nn.Module

    def run(self, params: Params, batch: Any, buffers: Tree, places: Places) -> tuple[Any, ...]:
        """Run the compiled module."""
        inner = ModelLoss(self.compiled, self.criterion, self.has_aux)
        prefixed = ({PREFIX + name: t for name, t in tree.items()} for tree in (params, buffers))
        renamed, incoming = prefixed
        loss, after, *aux = inner.run(renamed, batch, incoming, Places.of(self.compiled))
        return loss, {name: after[PREFIX + name] for name in buffers}, *aux


def loss_of(
    model: nn.Module, criterion: Callable[..., Any] | None, scale: Tensor | None
) -> ModelLoss:
    """The pure loss of a module, compiled or not; with a scale, (scaled loss, loss).

    Args:
        model: The module as the user has it.
        criterion: As in `model_loss`.
        scale: () factor of the loss, or None.
    """
    if scale is not None:
        criterion = scaled_criterion(criterion, scale)
    original = original_of(model)
    if original is model:
        return ModelLoss(model, criterion, scale is not None)
    return CompiledLoss(original, criterion, scale is not None, compiled=model)


def original_of(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    return model.get_submodule(PREFIX[:-1]) if _is_compiled_module(model) else model


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """The plan a module allows: torch refuses vmap over compiled code.

    Raises:
        ValueError: A compiled module and a plan that needs vmap.
    """
    compiled = any(
        _is_compiled_module(m) or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    if not compiled or plan == "loop":
        return plan
    why = "torch refuses vmap over a compiled module, so that its rows take M backward passes"
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


def _is_compiled_module(module: nn.Module) -> bool:
    # Whoever compiled a module has imported the compiler; others should not wait for that.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
