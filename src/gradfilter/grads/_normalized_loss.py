"""Convert every kind of loss to one form: ``(params, batch, buffers) -> (scalar, buffers, aux)``.

The file also checks the graph of a loss. A loss that uses the module's own parameters instead of
those it is given would have a zero gradient with respect to the given ones, so it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradfilter._shards import is_shard_hook, kept_gathered
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import MarkedBatch
from gradfilter.grads._buffer_watch import cumulative_means
from gradfilter.grads._loss import (
    ModelLoss,
    RefusedByAll,
    check_differentiable,
    check_names,
    check_value,
    loss_of_row,
    split_aux,
    unreached_error,
)
from gradfilter.grads._module_attributes import Attributes
from gradfilter.grads._module_tensors import Hook, ModuleTensors
from gradfilter.grads._state_owners import STANDARD, Owners, forward_methods, owners_in

# --- The ends of the graph of a loss ---


REENTRANT = "CheckpointFunctionBackward"
LOOKUP = "EmbeddingBackward0"
NO_PADDING = 2**63
"""Smaller values are indices: torch stores −1, no padding, as an unsigned number."""


@dataclass(frozen=True)
class GraphEnds:
    """The leaves at which the graph of a loss ends.

    Attributes:
        reached: True if the graph ends in one of the given leaves.
        bypassed: The name of a module's own parameter that it ends in, and the parameter.
        others: All other tensors that it ends in.
        reentrant: True if it holds a reentrant checkpoint, which hides the end of its part.
        padded_lookup: True if it holds an embedding with ``padding_idx`` that torch itself runs.
        custom: True if it holds an ``autograd.Function`` of the user, whose backward pass may
            change a gradient in any way.
        closed: True if it ends in the given leaves alone.
    """

    reached: bool
    bypassed: tuple[str, Tensor] | None
    others: list[Tensor]
    reentrant: bool
    padded_lookup: bool = False
    custom: bool = False
    closed: bool = False


def ends_of(value: Tensor, leaves: Iterable[Tensor], own: Mapping[str, Tensor]) -> GraphEnds:
    """Find the ends of the whole graph of a loss.

    Args:
        value: The loss, or the losses of all rows.
        leaves: The tensors to differentiate.
        own: The module's trainable parameters, by name.
    """
    wanted = {id(leaf) for leaf in leaves}
    strangers = {id(p): name for name, p in own.items()}
    if value.grad_fn is None:
        return GraphEnds(id(value) in wanted, None, [], False)
    seen = {value.grad_fn}
    ahead: list[Any] = [value.grad_fn]
    kinds: set[Any] = set()  # far fewer than nodes, so each kind is examined once
    reached = padded = False
    closed = True
    stranger: tuple[str, Any] | None = None
    others: list[Tensor] = []
    while ahead:
        node = ahead.pop()
        edges = node.next_functions
        if edges:
            kind = type(node)
            kinds.add(kind)
            if kind.__name__ == LOOKUP and 0 <= node._saved_padding_idx < NO_PADDING:
                padded = True
        else:
            variable = getattr(node, "variable", None)
            closed = closed and id(variable) in wanted
            if id(variable) in wanted:
                reached = True
            elif id(variable) in strangers:
                stranger = strangers[id(variable)], variable
            elif variable is not None:
                others.append(variable)
        for before, _ in edges:
            if before is not None and before not in seen:
                seen.add(before)
                ahead.append(before)
    reentrant = REENTRANT in [kind.__name__ for kind in kinds]
    # torch sets _forward_cls, which the type of the class does not list.
    functions: list[Any] = [kind for kind in kinds if issubclass(kind, BackwardCFunction)]
    custom = not all(f._forward_cls.__module__.startswith("gradfilter.") for f in functions)
    closed = closed and not reentrant
    return GraphEnds(reached, stranger, others, reentrant, padded, custom, closed)


def bypass_error(
    name: str, parameter: Any, modules: Mapping[str, nn.Module], criterion: Any
) -> RefusedByAll:
    """Return the error for a loss that uses a module's own parameter."""
    way = next(_paths_to(parameter, modules, criterion), "a reference that no attribute holds")
    return RefusedByAll(
        f"Expected a loss that finds the parameters in the module, found {name!r} reached by "
        f"{way}. Rows are computed at the parameters that are given, which stand in the "
        "module's registered places while the loss runs: through any other reference the gradient "
        "would be lost. Read the parameter in forward as an attribute (self.weight), register "
        "submodules (nn.ModuleList instead of a list), and do not script modules that hold "
        "their weights in lists (LSTM, GRU)."
    )


def _paths_to(parameter: Any, modules: Mapping[str, nn.Module], criterion: Any) -> Iterator[str]:
    for prefix, module in modules.items():
        for key, value in vars(module).items():
            if key not in STANDARD and _holds(value, parameter, 3):
                kind = type(value).__name__
                place = f"{prefix}.{key}" if prefix else key
                yield f"{place!r} of {type(module).__name__} ({kind})"
    for key, value in _closed_over(criterion):
        if _holds(value, parameter, 3):
            yield f"{key!r} of the criterion ({type(value).__name__})"
    for prefix, module in modules.items():
        if "Script" in type(module).__mro__[0].__name__ or hasattr(module, "_c"):
            yield f"the scripted module {prefix!r}"


def _closed_over(criterion: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values that a criterion refers to: closed over, global, or its attributes."""
    function = getattr(criterion, "__func__", criterion)
    if inspect.isfunction(function):
        found = inspect.getclosurevars(function)
        yield from {**found.globals, **found.nonlocals}.items()
    elif hasattr(criterion, "__dict__"):
        yield from vars(criterion).items()


def _holds(value: Any, parameter: Any, depth: int) -> bool:
    if value is parameter:
        return True
    if depth == 0:
        return False
    if isinstance(value, nn.Module):
        return any(p is parameter for p in value.parameters())
    if isinstance(value, Mapping):
        return any(_holds(item, parameter, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds(item, parameter, depth - 1) for item in value)
    return False


# --- The normalized loss ---


def _without_options(criterion: Any) -> Any:
    """Return the function of a `functools.partial` that fixes options, none of them functions."""
    while isinstance(criterion, partial) and not any(
        callable(value) for value in (*criterion.args, *criterion.keywords.values())
    ):
        criterion = criterion.func
    return criterion


def _own_methods(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Yield what the forward passes and hooks of modules refer to, other than the modules."""
    modules = list(modules)
    functions: list[Any] = forward_methods(modules)
    for module in modules:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hooks:
            functions += [hook for hook in hooks if not is_shard_hook(hook)]
    known = set[int]()
    for function in functions:
        for owner in owners_in(function, names=True):
            if id(owner) not in known and not isinstance(owner, nn.Module):
                known.add(id(owner))
                yield owner


@dataclass(eq=False)
class NormalizedLoss:
    """A module's loss or a plain one, with its module as it is when a batch is given.

    Attributes:
        loss: The result of `model_loss`, or a plain ``loss(params, batch)``.
        has_aux: True if a plain loss returns ``(scalar, aux)``.
        places: The tensors of the module, found once; None for a plain loss.
        first: True at the parameters from which an update will start, not at others nearby.
    """

    loss: Any
    has_aux: bool
    places: ModuleTensors | None
    first: bool = True

    @classmethod
    def of(cls, loss: Any, has_aux: bool) -> NormalizedLoss:
        """Return the normalized form of a loss, with its module as it is now."""
        places = ModuleTensors.of(loss.model) if isinstance(loss, ModelLoss) else None
        if places is not None and not loss.in_place:
            refuse_late_hooks(places.trainable)
        return cls(loss, has_aux, places)

    @cached_property
    def cumulative(self) -> set[str]:
        """The names of running means with momentum None."""
        return set() if self.places is None else cumulative_means(self.places.modules)

    def kept_gathered(self) -> frozenset[str]:
        """Return the names of the parameters that FSDP2 gathers once for both passes."""
        return frozenset() if self.places is None else kept_gathered(self.places.modules)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules of the model and of the criterion, by name."""
        if self.places is None:
            return {}
        return {**self.places.modules, **self._criterion_modules}

    @cached_property
    def _criterion_owners(self) -> list[Any]:
        """Return the modules and the user's objects that the criterion refers to."""
        return list(owners_in(self.loss.criterion, names=True))

    @cached_property
    def _criterion_modules(self) -> dict[str, nn.Module]:
        """Return the modules of a criterion that are not the model's, by new names."""
        if self.places is None:
            return {}
        known = {id(module) for module in self.places.modules.values()}
        prefix, modules = "criterion", dict[str, nn.Module]()
        for owner in self._criterion_owners:
            if isinstance(owner, nn.Module):
                while prefix in self.places.modules or prefix in modules:
                    prefix += "_"
                for name, module in owner.named_modules(prefix=prefix):
                    if id(module) not in known:
                        known.add(id(module))
                        modules[name] = module
        return modules

    @cached_property
    def may_draw_on_host(self) -> bool:
        """True if the loss runs anything but torch's own modules and functions.

        Those draw only from torch's generators, and reading the states of the others takes a
        fraction of a millisecond.
        """
        if self.places is None:
            return True
        modules = self.modules.values()
        for module in modules:
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return True
        criterion = _without_options(getattr(self.loss, "criterion", None))
        called = [*map(type, modules), *([] if criterion is None else [criterion])]
        homes = {str(getattr(kind, "__module__", None)) for kind in called}
        return {home.partition(".")[0] for home in homes} != {"torch"}

    @cached_property
    def attributes(self) -> Attributes:
        """The attributes of the modules, recorded at the first access.

        They include the buffers of the criterion's modules, which are not passed to anything, and
        the attributes of the user's own objects that the criterion, or a plain loss, refers to.
        """
        more = [
            (name, table)
            for name, module in self._criterion_modules.items()
            for table in (module._buffers, module._parameters)
        ]
        if self.places is None:
            return Attributes({}, (), (("loss", own) for own in owners_in(self.loss, names=True)))
        called = [("forward", method) for method in _own_methods(self.modules.values())]
        criterion = self.loss.criterion
        if isinstance(criterion, Owners):
            return Attributes(self.modules, [*more, ("", vars(criterion))], called)
        own = [("criterion", o) for o in self._criterion_owners if not isinstance(o, nn.Module)]
        return Attributes(self.modules, more, [*called, *own])

    @property
    def hooks(self) -> dict[str, list[Hook]]:
        """The gradient hooks of the module's parameters that run on every row, by name."""
        if self.places is None or self.loss.in_place:
            return {}
        return self.places.hooks

    def hook(self, leaves: Tree) -> None:
        """Register the hooks of the module's parameters on the leaves that replace them."""
        for name, hooks in self.hooks.items():
            register: Any = leaves[name].register_hook
            for hook in hooks:
                register(hook)

    def ends(self, value: Tensor, leaves: Iterable[Tensor]) -> GraphEnds:
        """Find the ends of the graph of a loss; refuse a parameter of the module itself."""
        ends = ends_of(value, leaves, {} if self.places is None else self.places.trainable)
        if ends.bypassed is not None:
            raise self.bypassed(*ends.bypassed)
        return ends

    def bypassed(self, name: str, parameter: Tensor) -> ValueError:
        """Return the error for a loss that uses a module's own parameter."""
        return bypass_error(name, parameter, self.modules, getattr(self.loss, "criterion", None))

    def criterion_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers of a criterion that is a module; they are not part of the state."""
        for prefix, module in self._criterion_modules.items():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{prefix}.{key}", buffer

    def attribute_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in module attributes and the criterion's buffers, with names."""
        return iter(self.attributes.tensors)

    def clean_attributes(
        self, leaves: Tree, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> bool:
        """Remove the tensors of a pass from the attributes of the modules.

        Modules that store their weights (LSTM does) get their own back.

        Args:
            leaves: The tensors that replaced the parameters.
            convert: Replaces a tensor that must not be used after the pass.

        Returns:
            True if the pass has changed any attribute.
        """
        places = {} if self.places is None else self.places.trainable
        own = {id(leaf): places[name] for name, leaf in leaves.items() if name in places}

        def own_or_converted(tensor: Tensor) -> Tensor:
            return own[id(tensor)] if id(tensor) in own else convert(tensor)

        return self.attributes.convert_changed(own_or_converted)

    def check_reaches(self, value: Tensor, leaves: Iterable[Tensor]) -> GraphEnds:
        """Refuse a loss whose graph reaches none of the leaves."""
        check_differentiable(value)
        ends = self.ends(value, leaves)
        if not ends.reached and not ends.reentrant:
            raise unreached_error()
        return ends

    def check_params(self, params: Params) -> None:
        """Refuse parameters that are not the module's."""
        if self.places is not None:
            check_names("parameters", params, self.places.trainable)

    def incoming(self, buffers: Tree | None) -> Tree:
        """Return the buffers before the first row: the given ones, or the module's own."""
        if self.places is None and buffers:
            raise TypeError(
                "Expected no buffers with a plain loss(params, batch), which cannot take them. "
                "Make the loss with model_loss(model, criterion), or close over them."
            )
        if self.places is None:
            return {}
        if buffers is None:
            return {name: b.detach().clone() for name, b in self.places.buffers.items()}
        check_names("buffers", buffers, self.places.buffers)
        return {name: b.detach() for name, b in buffers.items()}

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """Return a leaf to differentiate, with its own memory if the loss may write into it."""
        written = self.places is not None and name in self.places.renormalised
        return as_parameter((value.clone() if written else value).detach().requires_grad_())

    def untouchable(self, leaves: Tree) -> Iterator[tuple[str, Tensor]]:
        """Yield the leaves that share memory with the given parameters, each with a name."""
        own = () if self.places is None else self.places.renormalised
        return ((f"parameter {n!r}", leaf) for n, leaf in leaves.items() if n not in own)

    def renormalised(self, params: Tree, leaves: Tree) -> Tree:
        """Return the parameters after a row's forward pass has renormalised some of them.

        Raises:
            RefusedByAll: A pure update would start from the given parameters instead.
        """
        names = () if self.places is None else self.places.renormalised & leaves.keys()
        found = {n: leaves[n].detach() for n in names if not torch.equal(leaves[n], params[n])}
        if found and self.first and not self.loss.in_place:
            raise RefusedByAll(
                f"Expected an embedding whose rows are at most max_norm long, found "
                f"{min(found)!r} renormalised in the forward pass: an update would start from the "
                "weight as it was given. Renormalise it after every update (w.renorm(2, 0, "
                "max_norm)), or use gradfilter.interop.Filtered, which writes into the module."
            )
        return found

    @contextmanager
    def module_state(self, params: Params, buffers: Tree) -> Iterator[None]:
        """Replace the module's tensors inside the context, as in a forward pass.

        Backward passes need this, because activation checkpointing calls the module again.
        """
        if self.places is None:
            yield
            return
        with self.places.filled({**params, **{name: b.clone() for name, b in buffers.items()}}):
            yield

    def pure(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """Evaluate the loss without changing its arguments."""
        if self.places is not None:
            buffers = {name: b.clone() for name, b in buffers.items()}
        return self.writing(params, batch, buffers)

    def pure_and_clean(self, leaves: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """Evaluate as `pure` does; if it raises, remove the leaves from the modules."""
        try:
            return self.pure(leaves, batch, buffers)
        except BaseException:
            self.clean_attributes(leaves)
            raise

    def writing(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """Evaluate the loss; a module writes into the given buffers."""
        loss, aux = self.loss, None
        if isinstance(self.loss, ModelLoss) and self.places is not None:
            value, buffers, *rest = self.loss.run(params, batch, buffers, self.places)
            aux = rest[0] if rest else None
        else:
            value = loss(params, batch.batch if isinstance(batch, MarkedBatch) else batch)
            if self.has_aux:
                value, aux = split_aux(value)
            value = loss_of_row(value, batch)
        check_value(value, aux)
        return value, buffers, aux


def as_parameter(tensor: Tensor) -> Tensor:
    """Mark a tensor so that ``isinstance(tensor, nn.Parameter)`` is true, and return it.

    It replaces a module's parameter, and modules may check this (`nn.Module.get_parameter` does).
    """
    tensor._is_param = True
    return tensor


def as_parameters(tensors: list[Tensor]) -> list[Tensor]:
    """Mark all tensors as `as_parameter` does, and return them."""
    for tensor in tensors:
        tensor._is_param = True
    return tensors


def refuse_late_hooks(trainable: Tree) -> None:
    """Refuse hooks that run after ``p.grad`` is written, which does not happen here."""
    for name, p in trainable.items():
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"Expected no post-accumulate hook on a parameter, found one on {name!r}: it waits "
                "for a backward pass that writes p.grad, and none does here. Use p.register_hook "
                "for what changes the gradient, gradfilter.interop.Filtered, which writes p.grad, "
                "or take the optimizer's step outside of hooks."
            )
