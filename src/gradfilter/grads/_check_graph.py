"""Where the graph of a loss ends: in the leaves that are differentiated, or in others.

A loss that uses the parameters of a module instead of those it is given has a gradient, only not
with respect to those it was given: for them it would be zero, in part or in whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradfilter.grads._attributes import STANDARD
from gradfilter.grads._check_loss import RefusedByAll

REENTRANT = "CheckpointFunctionBackward"
LOOKUP = "EmbeddingBackward0"
NO_PADDING = 2**63
"""Up to here an index: torch keeps −1, no padding, as a number without a sign."""


@dataclass(frozen=True)
class Ends:
    """Where the graph of a loss ends.

    Attributes:
        reached: Whether it ends in one of the leaves.
        bypassed: The name of a module's own parameter that it ends in, and the parameter.
        others: All other tensors that it ends in.
        reentrant: Whether it holds a reentrant checkpoint, which hides where its part ends.
        padded_lookup: Whether it holds an embedding with ``padding_idx`` as torch itself runs it.
        custom: Whether it holds an ``autograd.Function`` of the user's, whose backward pass may do
            anything with a gradient.
    """

    reached: bool
    bypassed: tuple[str, Tensor] | None
    others: list[Tensor]
    reentrant: bool
    padded_lookup: bool = False
    custom: bool = False


def ends_of(value: Tensor, leaves: Iterable[Tensor], own: Mapping[str, Tensor]) -> Ends:
    """Walk through the whole graph of a loss.

    Args:
        value: The loss, or the losses of all rows.
        leaves: What is differentiated.
        own: The module's trainable parameters, by name.
    """
    wanted = {id(leaf) for leaf in leaves}
    strangers = {id(p): name for name, p in own.items()}
    if value.grad_fn is None:
        return Ends(id(value) in wanted, None, [], False)
    seen = {value.grad_fn}
    ahead: list[Any] = [value.grad_fn]
    kinds: set[Any] = set()  # far fewer than nodes: what a name tells is asked once
    reached = padded = False
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
    reentrant = any(kind.__name__ == REENTRANT for kind in kinds)
    return Ends(reached, stranger, others, reentrant, padded, any(map(_is_custom, kinds)))


def _is_custom(kind: Any) -> bool:
    return issubclass(kind, BackwardCFunction) and not kind._forward_cls.__module__.startswith(
        "gradfilter."
    )


def bypassed(
    name: str, parameter: Any, modules: Mapping[str, nn.Module], criterion: Any
) -> RefusedByAll:
    """What is said of a parameter that the loss uses as it is in the module."""
    way = next(_ways(parameter, modules, criterion), "a reference that no attribute holds")
    return RefusedByAll(
        f"Expected a loss that finds the parameters in the module, found {name!r} reached by "
        f"{way}. Rows are computed at the parameters that are given, which stand in the "
        "module's registered places while the loss runs: through any other reference the gradient "
        "would be lost. Read the parameter in forward as an attribute (self.weight), register "
        "submodules (nn.ModuleList instead of a list), and do not script modules that hold "
        "their weights in lists (LSTM, GRU)."
    )


def _ways(parameter: Any, modules: Mapping[str, nn.Module], criterion: Any) -> Iterator[str]:
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
    """The values that a criterion refers to: closed over, global, or of its own."""
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
