"""The state that operation overrides use while a loss runs over all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._buffer_watch import RunningUpdates
from gradfilter.grads.fused._along import Move, own_rows
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
    moves: Mapping[str, Move] = field(default_factory=dict)
    """What every row adds to a leaf, by the leaf's name."""

    moved: set[str] = field(default_factory=set)
    """The leaves with a move whose values in every row were computed."""

    def in_pass(self) -> AbstractContextManager[None]:
        """Return a context with the level and the overrides, for a hook of the backward pass."""
        return self.reenter(self)

    drew: bool = False
    """True if a single random number was drawn for each row; answers may depend on it."""

    def __post_init__(self) -> None:
        """Index the leaves by identity."""
        self._leaves = {
            id(rows): Weight(rows.detach()[0], rows, name, self.moves.get(name))
            for name, rows in self.tape.leaves.items()
            if is_shared(rows)
        }
        self._own: dict[str, Tensor] = {}

    def batched(self, *values: Any) -> bool:
        """Return whether some value differs between rows, judged by its type."""
        return any(self.level.batched(value) for value in values)

    def wanted(self, x: Tensor, *weights: Tensor | None) -> bool:
        """Return whether a layer needs its override; a frozen one only under autocast."""
        if self.batched(*weights):
            return True
        return self.level.batched(x) and autocast_dtype(x.device) is not None

    def weight(self, value: Tensor, *, moves: bool = False) -> Weight | None:
        """Return a parameter that all rows share, or None if every row has its own.

        The value that an override gets may be a leaf, a view or function of leaves, or frozen.

        Args:
            value: The parameter as the override gets it.
            moves: True if the override uses `Weight.move`.
        """
        if not self.level.batched(value):
            return Weight(value, None, None)
        rows = self.level.lower(value)
        if id(rows) in self._leaves:
            found = self._leaves[id(rows)]
            return found if moves or found.move is None else None
        return Weight(rows.detach()[0], rows, None) if is_shared(rows) else None

    def weights(
        self, *values: Tensor | None, moves: bool = False
    ) -> tuple[Weight | None, ...] | None:
        """Apply `weight` to every value that is not None; None if rows have their own of any."""
        found = [None if value is None else self.weight(value, moves=moves) for value in values]
        if any(w is None and v is not None for w, v in zip(found, values, strict=True)):
            return None
        return tuple(found)

    def own(self, value: Any) -> Any:
        """Return the values of all rows in place of a leaf that has a move; else the value."""
        if not self.moves or not self.level.batched(value):
            return value
        weight = self._leaves.get(id(self.level.lower(value)))
        if weight is None or weight.move is None or weight.leaf is None or weight.rows is None:
            return value
        if weight.leaf not in self._own:
            # The first use may be one without gradients.
            with self.level.on_all_rows(), torch.enable_grad():
                rows = own_rows(weight.rows, self.moved_values(weight))
            self._own[weight.leaf] = self.level.wrap(rows)
        return self._own[weight.leaf]

    def moved_values(self, weight: Weight) -> Tensor:
        """Compute the values of all rows of a leaf that has a move. (M, *shape)."""
        assert weight.move is not None and weight.leaf is not None
        self.moved.add(weight.leaf)
        return weight.move.of(weight.value)

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
        w and replace(w, value=w.value.to(dtype) if w.value.is_floating_point() else w.value)
        for w in weights
    ]
    return (x.to(dtype), *cast, torch.autocast(x.device.type, enabled=False))
