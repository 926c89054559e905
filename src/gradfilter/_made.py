"""Record how a transform or a schedule was made, so that another process can make it again.

Both consist of functions that close over hyperparameters, which pickle refuses. So the call of the
factory that made them is pickled instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from typing_extensions import override

P = ParamSpec("P")
R = TypeVar("R", bound="Remade")


@dataclass(frozen=True, eq=False)
class Made:
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


class Remade:
    """An immutable object that is pickled as the call that made it; a copy is the object itself."""

    made: Made | None

    if TYPE_CHECKING:  # every subclass has its own

        @property
        def core(self) -> Any:
            """The functions that define the object."""

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the call, unless the object differs from the result of the call."""
        made = self.made
        if made is None or made.core != self.core:
            return super().__reduce_ex__(protocol)
        return _make, (made.factory, made.args, made.kwargs)

    def __copy__(self) -> Any:
        """Return the object itself."""
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        """Return the object itself."""
        return self


def remembered(factory: Callable[P, R]) -> Callable[P, R]:
    """Decorate a factory so that its results record the call."""

    @wraps(factory)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        made = factory(*args, **kwargs)
        if torch.compiler.is_compiling():  # the object is made in every step, for that step only
            return made
        given: Any = made
        remembers: R = replace(given, made=Made(call, args, kwargs, made.core))
        return remembers

    return call


def unremembered(factory: Callable[P, R]) -> Callable[P, R]:
    """Return the factory inside `remembered`; other decorators stay in place."""
    given: Any = factory
    remembering: Any = remembered(Remade)
    code = remembering.__code__  # shared by exactly the functions that `remembered` returns
    same = getattr(given, "__code__", None) is code
    plain: Callable[P, R] = given.__wrapped__ if same else factory
    return plain


def _make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs)
