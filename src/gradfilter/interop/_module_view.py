"""The tensors of a model, and of a criterion with tensors of its own, as those of one module."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn


class ModuleView(nn.Module):
    """A model under its own names, its criterion's tensors as ``criterion.…``, another forward.

    It shares the tables of tensors and copies none of them: whoever swaps a tensor here swaps it
    for the model and for the criterion, and transforms that choose by name see the model's names.

    Args:
        model: Whose tensors are seen.
        forward: What a call runs.
        criterion: A module whose tensors are also seen.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], criterion: nn.Module | None = None
    ) -> None:
        super().__init__()
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        # nn.Module would register a module among those of the model.
        vars(self)["_forward"] = forward
        self._parts = [("", model)]
        if criterion is not None:
            name = "criterion"
            while hasattr(model, name):
                name += "_"
            other: dict[str, nn.Module | None] = {name: criterion}
            self._modules = cast(Any, ChainMap(model._modules, other))
            self._parts.append((name, criterion))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run what was given."""
        return vars(self)["_forward"](*args, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules of both, the model itself in the place of this view."""
        memo = set() if memo is None else memo
        for name, part in self._parts:
            place = f"{prefix}.{name}" if prefix and name else prefix + name
            yield from part.named_modules(memo, place, remove_duplicate)


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def module_of(criterion: Callable[..., Any] | None, model: nn.Module) -> nn.Module | None:
    """The module that a criterion is or belongs to, if it has tensors that are not the model's.

    Args:
        criterion: A function, a module, a method of one, or a `functools.partial` of these.
        model: Whose tensors need no other home.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    owner = getattr(criterion, "__self__", criterion)
    if not isinstance(owner, nn.Module):
        return None
    own = {id(tensor) for tensor in tensors_in(model)}
    return owner if any(id(tensor) not in own for tensor in tensors_in(owner)) else None
