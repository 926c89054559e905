"""Mark a function as a factory: its transforms and schedules know the call that made them.

The call is what is pickled: the functions inside are private, and some close over hyperparameters,
which pickle refuses. The call is also what they show when they are printed, and where
`hyperparameters` reads its values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

P = ParamSpec("P")
R = TypeVar("R", bound="MadeByFactory")


@dataclass(frozen=True, eq=False)
class FactoryCall:
    """A call of a factory.

    Attributes:
        factory: A function of a module.
        args: The arguments.
        kwargs: The keyword arguments.
        core: The functions of the result.
    """

    factory: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    core: Any

    def bound(self) -> inspect.BoundArguments:
        """Return the given arguments under the names of the factory's parameters."""
        return inspect.signature(self.factory).bind(*self.args, **self.kwargs)

    @override
    def __str__(self) -> str:
        """Return the call with the name of every given argument: ``agree_filter(threshold=0.97)``.

        The values of tensors are not read.
        """
        bound = self.bound()
        texts: list[str] = []
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                texts += [shown(item) for item in value]
            elif kind is inspect.Parameter.VAR_KEYWORD:
                texts += [f"{key}={shown(item)}" for key, item in value.items()]
            elif kind is inspect.Parameter.POSITIONAL_ONLY:
                texts.append(shown(value))
            else:
                texts.append(f"{name}={shown(value)}")
        return f"{self.factory.__name__}({', '.join(texts)})"


class MadeByFactory:
    """An immutable object that is pickled as the call that made it; a copy is the object itself."""

    made_by: FactoryCall | None

    if TYPE_CHECKING:  # every subclass has its own

        @property
        def core(self) -> Any:
            """The functions that define the object."""

    @property
    def call(self) -> FactoryCall | None:
        """The call that made the object; None if there is none, or if a field was replaced."""
        made_by = self.made_by
        return None if made_by is None or made_by.core != self.core else made_by

    def with_call(self, made_by: FactoryCall) -> Any:
        """Return the same object with the call that made it."""
        this: Any = self
        return replace(this, made_by=made_by)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the call; refuse an object that differs from the result of its call."""
        call = self.call
        if call is None and self.made_by is not None:
            raise PicklingError(
                f"Expected {self.made_by} as it was made, found it with other fields, which are "
                "local to this process. Make the change in a function of a module, and call that "
                "function in the other process."
            )
        if call is None:
            return super().__reduce_ex__(protocol)
        return _make, (call.factory, call.args, call.kwargs)

    def __copy__(self) -> Any:
        """Return the object itself."""
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        """Return the object itself."""
        return self


def factory(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that the transforms or schedules it returns know the call."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        made = function(*args, **kwargs)
        if torch.compiler.is_compiling():  # the object is made in every step, for that step only
            return made
        known: R = made.with_call(FactoryCall(call, args, kwargs, made.core))
        return known

    return call


def undecorated(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function inside `factory`; other decorators stay in place."""
    given: Any = function
    decorated: Any = factory(MadeByFactory)
    code = decorated.__code__  # shared by exactly the functions that `factory` returns
    same = getattr(given, "__code__", None) is code
    plain: Callable[P, R] = given.__wrapped__ if same else function
    return plain


def _make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs)


def shown(value: Any) -> str:
    """Return a short text of an argument: functions by their name, tensors by their shape."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(shown, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if callable(value) and not isinstance(value, MadeByFactory):
        return getattr(value, "__name__", None) or type(value).__name__
    return repr(value)
