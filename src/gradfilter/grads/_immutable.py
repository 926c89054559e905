"""What keeps a stack's answers its own, though whoever gets one may write to it.

Few numbers are copied: losses, factors, Grams and norms. Rows, of which a copy would take as much
memory again, are given as they are and watched: torch counts the writes to a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradfilter._shards import is_sharded, local

T = TypeVar("T")


def copied(*names: str) -> Callable[[type[T]], type[T]]:
    """Let whoever reads one of these attributes of a class have a copy of the tensor in it."""

    def decorated(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, _Copied(name))
        return cls

    return decorated


class _Copied:
    """An attribute of few numbers, of which everybody gets a copy."""

    def __init__(self, name: str) -> None:
        # Another name than that of the attribute: torch 2.11's compiler mixes up the two.
        self._place = f"_own_{name}"

    def __get__(self, stack: Any, owner: type | None = None) -> Any:
        """A copy, or None."""
        if stack is None:
            return self
        held = getattr(stack, self._place)
        return held if held is None else held.clone()

    def __set__(self, stack: Any, value: Tensor | None) -> None:
        """Take a copy, which stays as it is whatever the caller does."""
        object.__setattr__(stack, self._place, value if value is None else value.clone())


def versions(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """How often each tensor was written to so far; None where nobody counts."""
    if torch.compiler.is_compiling():
        return None
    return {
        name: _writes(t) for name, t in tensors.items() if not (t.is_inference() or _wrapped(t))
    }


def written(tensors: Mapping[str, Tensor], before: dict[str, int] | None) -> list[str]:
    """The names of those that were written to since `versions`."""
    if before is None or torch.compiler.is_compiling():
        return []
    return [name for name, version in before.items() if _writes(tensors[name]) != version]


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to; of a sharded one by its own name or as the shard."""
    return tensor._version + (local(tensor)._version if is_sharded(tensor) else 0)


def _wrapped(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps it, and counts for itself."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
