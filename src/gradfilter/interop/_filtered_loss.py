"""The loss a wrapper differentiates, also of a compiled module."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradfilter._shards import is_sharded
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


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """The plan a module allows: under vmap torch runs compiled code uncompiled, or not at all.

    Raises:
        ValueError: A compiled module and a plan that needs vmap.
    """
    if plan == "loop" or not has_compiled(model):
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


def has_compiled(model: nn.Module) -> bool:
    """Whether a module, or a part of it, is compiled."""
    return any(
        _is_compiled_module(m) or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def _is_compiled_module(module: nn.Module) -> bool:
    # Whoever compiled a module has imported the compiler; others should not wait for that.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
