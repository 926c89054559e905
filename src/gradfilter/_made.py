"""How a transform or a schedule was made, so that another process can make it again.

Both consist of functions that close over hyperparameters, which pickle refuses. The call of the
factory that made them says as much: pickle gets that one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R", bound="Remade")


@dataclass(frozen=True, eq=False)
class Made:
    """A call of a factory.

    Attributes:
        factory: A function of a module.
        args: Its arguments.
        kwargs: Its keyword arguments.
        core: What came out, as its functions.
    """

    factory: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    core: Any


class Remade:
    """What is pickled as the call that made it, and copied by not copying: it never changes."""

    made: Made | None

    @property
    def core(self) -> Any:
        """The functions without which this would be something else."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The call, unless somebody has changed what it made."""
        made = self.made
        if made is None or made.core != self.core:
            return super().__reduce_ex__(protocol)
        return _make, (made.factory, made.args, made.kwargs)

    def __copy__(self) -> Any:
        """The same."""
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        """The same."""
        return self


def remembered(factory: Callable[P, R]) -> Callable[P, R]:
    """Let what a factory makes know how it was made."""

    @wraps(factory)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        made = factory(*args, **kwargs)
        if torch.compiler.is_compiling():  # made anew in every step, and for that step alone
            return made
        given: Any = made
        remembers: R = replace(given, made=Made(call, args, kwargs, made.core))
        return remembers

    return call


def unremembered(factory: Callable[P, R]) -> Callable[P, R]:
    """The factory that `remembered` was given; decorators of others are part of what they make."""
    given: Any = factory
    remembering: Any = remembered(Remade)
    code = remembering.__code__  # that of every function `remembered` returns, and of no other
    same = getattr(given, "__code__", None) is code
    plain: Callable[P, R] = given.__wrapped__ if same else factory
    return plain


def _make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs)
