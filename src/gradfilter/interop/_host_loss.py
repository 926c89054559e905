"""Make the loss that a host differentiates from a model, a criterion and a loss scale."""

from __future__ import annotations

import sys
import warnings
from collections import ChainMap
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from typing_extensions import override

from gradfilter import _tree
from gradfilter._shards import is_sharded
from gradfilter._types import Params, Transform, Tree
from gradfilter.grads._loss import ModelLoss, refuse_class, refuse_lazy
from gradfilter.grads._microbatch import Plan
from gradfilter.grads._module_tensors import ModuleTensors
from gradfilter.grads._sample_groups import GroupedStack
from gradfilter.grads._stack import ComputedStack, GradStack, StackOrigin

# --- One module with the tensors of a model and of a criterion with parameters ---


class ModuleView(nn.Module):
    """A model under its own names, with its criterion's tensors as ``criterion.…``.

    It shares the tables of tensors and copies none of them: a tensor replaced here is also replaced
    in the model and the criterion. Transforms that choose by name see the model's names.

    Args:
        model: The model whose tensors are shown.
        forward: The function that a call runs.
        criterion: A module whose tensors are also shown.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], criterion: nn.Module | None = None
    ) -> None:
        super().__init__()
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        # nn.Module would register the module as a part of the model.
        vars(self)["_forward"] = forward
        self._parts = [("", model)]
        if criterion is not None:
            name = "criterion"
            while hasattr(model, name):
                name += "_"
            other: dict[str, nn.Module | None] = {name: criterion}
            self._modules = cast(Any, ChainMap(model._modules, other))
            self._parts.append((name, criterion))

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the given function."""
        return vars(self)["_forward"](*args, **kwargs)

    @override
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """Yield the modules of both, with the model itself in place of this view."""
        memo = set() if memo is None else memo
        for name, part in self._parts:
            place = f"{prefix}.{name}" if prefix and name else prefix + name
            yield from part.named_modules(memo, place, remove_duplicate)


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


def module_of(criterion: Callable[..., Any] | None, model: nn.Module) -> nn.Module | None:
    """Return the module of a criterion, if it has tensors that are not the model's.

    Args:
        criterion: A function, a module, a method of one, or a `functools.partial` of these.
        model: The model, whose own tensors do not count.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    owner = getattr(criterion, "__self__", criterion)
    if not isinstance(owner, nn.Module):
        return None
    own = {id(tensor) for tensor in tensors_in(model)}
    return owner if any(id(tensor) not in own for tensor in tensors_in(owner)) else None


# --- Embeddings with max_norm: torch renormalises the rows that a forward pass looks up ---


@contextmanager
def renormalised(module: nn.Module) -> Iterator[None]:
    """Renormalise on exit the embedding rows that passes inside the context looked up.

    A pure loss renormalises a copy of the given weight. In a plain loop the forward pass writes
    into the weight itself, and the optimizer starts from the renormalised weight.
    """
    embeddings = [m for m in module.modules() if getattr(m, "max_norm", None) is not None]
    looked_up: list[tuple[Any, Tensor]] = []

    def note(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[0] if args else kwargs["input"]
        if not _functorch.is_functorch_wrapped_tensor(index):  # the index belongs to a refused pass
            looked_up.append((embedding, index.detach()))

    with ExitStack() as stack:
        for embedding in embeddings:
            hook = embedding.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
        yield
    with torch.no_grad():
        for embedding, index in looked_up:
            places = index.contiguous().flatten()
            torch.embedding_renorm_(
                embedding.weight, places, embedding.max_norm, embedding.norm_type
            )


# --- Loss scaling with torch.amp.GradScaler, by its public methods only ---


LARGEST_SCALE = 2.0**32
"""The largest loss scale: a larger one would overflow the products of rows."""


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """Return a copy of the present loss scale, or None without scaling. ()."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device)).detach().clamp(max=LARGEST_SCALE)


def update_scale(scaler: torch.amp.GradScaler, overflow: Tensor) -> None:
    """Tell a scaler whether gradients overflowed, and let it choose its next scale.

    Args:
        scaler: An enabled scaler.
        overflow: True if gradients overflowed, () bool.
    """
    # A scaler detects overflow only in the gradients of an optimizer, so make one.
    messenger = torch.zeros(1, device=overflow.device)
    messenger.grad = torch.where(overflow, torch.inf, 0.0).reshape(1)
    scaler.unscale_(torch.optim.SGD([messenger], lr=0.0))
    scaler.update()


@dataclass(frozen=True, eq=False)
class ScaledLoss(ModelLoss):
    """The pure loss of a module, scaled: (scaled loss, new buffers, (loss,) or (loss, aux)).

    The criterion is still the user's own, so that its attributes and random numbers are treated as
    those of a loss without a scale.

    Attributes:
        scale: The factor of the loss, ().
    """

    scale: Tensor = field(kw_only=True)

    @override
    def run(
        self, params: Params, batch: Any, buffers: Tree, places: ModuleTensors
    ) -> tuple[Any, ...]:
        loss, new_buffers, *aux = super().run(params, batch, buffers, places)
        # A scaled loss would overflow in half precision.
        return _tree.at_least_float32(loss) * self.scale, new_buffers, (loss, *aux)


def with_own_losses(rows: ComputedStack) -> ComputedStack:
    """Return rows of a `ScaledLoss` with unscaled ``losses``, also at other parameters.

    The rows themselves are those of the scaled losses, and ``aux`` is the criterion's own.
    """
    if isinstance(rows, GroupedStack):
        return rows.of(with_own_losses(rows.samples))
    losses, *aux = rows.aux
    origin = origin_with_own_losses(rows.origin)
    same: ComputedStack = replace(
        cast(Any, rows), losses=losses, aux=aux[0] if aux else None, origin=origin
    )
    return same


def origin_with_own_losses(origin: StackOrigin) -> StackOrigin:
    """Return the way to the rows of a `ScaledLoss` as to those of `with_own_losses`."""

    def evaluate(params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]) -> GradStack:
        return with_own_losses(cast(ComputedStack, origin.evaluate(params, per_row, kept)))

    return replace(origin, evaluate=evaluate)


# --- The loss, also of a compiled module ---


PREFIX = "_orig_mod."
"""The prefix that torch.compile adds to every name of the module it wraps."""


def view_of(model: nn.Module, criterion: Callable[..., Any] | None) -> nn.Module:
    """Return the module to differentiate: original names, with its criterion's tensors.

    Args:
        model: The user's module, compiled or not.
        criterion: See `model_loss`.
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
    """Make the pure loss; with a scale a `ScaledLoss`.

    Args:
        view: The result of `view_of`.
        criterion: See `model_loss`.
        has_aux: True if the criterion returns (loss, aux).
        scale: The factor of the loss, (), or None.
    """
    if scale is None:
        return ModelLoss(view, criterion, has_aux, in_place=True)
    return ScaledLoss(view, criterion, has_aux, in_place=True, scale=scale)


def check_order(criterion: Any, transforms: Any, optimizer: Any) -> None:
    """Refuse arguments in the wrong order.

    Raises:
        TypeError: An optimizer or a chain is in the wrong position.
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
        name: The beginning of the error.
        model: The model, whose own parameters are not checked.
        criterion: See `model_loss`.
        optimizer: The optimizer that must have them.

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


def check_module(name: str, model: Any, *, shards: bool = False) -> None:
    """Refuse an object that is not a module, and a wrapper that these backward passes would bypass.

    Args:
        name: The beginning of the error.
        model: The user's argument.
        shards: True if parameters may be sharded over ranks.
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
    if not shards and any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"{name}: expected parameters that are whole on this rank, found sharded ones "
            "(DTensor). Use gradfilter.interop.Filtered."
        )


def original_of(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, or the module itself."""
    return model.get_submodule(PREFIX[:-1]) if _is_compiled_module(model) else model


def plan_for(model: nn.Module, criterion: Callable[..., Any] | None, plan: Plan) -> Plan:
    """Return the plan for a module: under vmap, torch runs compiled code uncompiled or not at all.

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
    """Return whether a module, a part of it, or its criterion is compiled."""
    other = module_of(criterion, model)
    return any(
        _is_compiled_module(m) or getattr(m, "_compiled_call_impl", None) is not None
        for part in (model, other)
        if part is not None
        for m in part.modules()
    )


def _is_compiled_module(module: nn.Module) -> bool:
    # A compiled module means that the compiler is imported; do not import it otherwise.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
