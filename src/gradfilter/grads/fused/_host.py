"""The state that operation overrides use while a loss runs over all rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._buffer_watch import RunningUpdates
from gradfilter.grads.fused._lift import Level, autocast_dtype, is_shared
from gradfilter.grads.fused._tape import Tape, Use, Weight

Override = Callable[..., Any]
"""``override(host, *args, **kwargs)`` replaces a function, or returns NotImplemented."""


@dataclass
class Host:
    """The forward pass over all rows, as operation overrides see it."""

    level: Level
    tape: Tape
    running: RunningUpdates
    reenter: Callable[[Host], AbstractContextManager[None]] = lambda host: nullcontext()

    def in_pass(self) -> AbstractContextManager[None]:
        """Return a context with the level and the overrides, for a hook of the backward pass."""
        return self.reenter(self)

    drew: bool = False
    """True if a single random number was drawn for each row; answers may depend on it."""

    def __post_init__(self) -> None:
        """Index the leaves by identity."""
        self._leaves = {
            id(rows): Weight(rows.detach()[0], rows, name)
            for name, rows in self.tape.leaves.items()
            if is_shared(rows)
        }

    def batched(self, *values: Any) -> bool:
        """Return whether some value differs between rows, judged by its type."""
        return any(self.level.batched(value) for value in values)

    def wanted(self, x: Tensor, *weights: Tensor | None) -> bool:
        """Return whether a layer needs its override; a frozen one only under autocast."""
        if self.batched(*weights):
            return True
        return self.level.batched(x) and autocast_dtype(x.device) is not None

    def weight(self, value: Tensor) -> Weight | None:
        """Return a parameter that all rows share, or None if every row has its own.

        The value that an override gets may be a leaf, a view or function of leaves, or frozen.
        """
        if not self.level.batched(value):
            return Weight(value, None, None)
        rows = self.level.lower(value)
        if id(rows) in self._leaves:
            return self._leaves[id(rows)]
        return Weight(rows.detach()[0], rows, None) if is_shared(rows) else None

    def weights(self, *values: Tensor | None) -> tuple[Weight | None, ...] | None:
        """Apply `weight` to every value that is not None; None if rows have their own of any."""
        found = [None if value is None else self.weight(value) for value in values]
        if any(w is None and v is not None for w, v in zip(found, values, strict=True)):
            return None
        return tuple(found)

    def run(self, name: str, compute: Callable[..., Any], *args: Any) -> Any:
        """Count an override, and run ``compute`` on the tensors of all rows."""
        self.tape.overrides[name] += 1
        return self.level.lift_call(compute, *args)

    def used(
        self,
        override: str,
        weight: Weight | None,
        flops: int,
        kept: int = 0,
        ghost_flops: int | None = None,
    ) -> None:
        """Note one use of a leaf for the choice of modes."""
        if weight is not None and weight.leaf is not None:
            self.tape.uses.append(Use(weight.leaf, override, flops, kept, ghost_flops))


def in_autocast(x: Tensor, *weights: Weight | None) -> tuple[Any, ...]:
    """Cast the operands of a matrix product as autocast does; add a context without autocast."""
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return (x, *weights, nullcontext())
    cast = [
        w and Weight(w.value.to(dtype) if w.value.is_floating_point() else w.value, w.rows, w.leaf)
        for w in weights
    ]
    return (x.to(dtype), *cast, torch.autocast(x.device.type, enabled=False))
