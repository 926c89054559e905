"""The state that operation overrides use while a loss runs over all rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._buffer_watch import RunningUpdates
from gradfilter.grads.fused._along import Move, own_rows
from gradfilter.grads.fused._checkpoints import Checkpoints
from gradfilter.grads.fused._factors import ghost_flops
from gradfilter.grads.fused._lift import Level, autocast_dtype, is_shared
from gradfilter.grads.fused._sharded_leaves import ShardedLeaf
from gradfilter.grads.fused._tape import ProductSize, Tape, Use, Weight

Override = Callable[..., Any]
"""``override(host, *args, **kwargs)`` replaces a function, or returns NotImplemented."""


@dataclass
class Host:
    """The forward pass over all rows, as operation overrides see it."""

    level: Level
    tape: Tape
    running: RunningUpdates
    checkpoints: Checkpoints
    reenter: Callable[[Host], AbstractContextManager[None]]
    rerun: Callable[[Host], AbstractContextManager[None]]
    values: Mapping[str, Tensor | ShardedLeaf] = field(default_factory=dict)
    """The value of every leaf that all rows share, detached, by the leaf's name."""

    moves: Mapping[str, Move] = field(default_factory=dict)
    """What every row adds to a leaf, by the leaf's name."""

    moved: set[str] = field(default_factory=set)
    """The leaves with a move whose values in every row were computed."""

    def in_pass(self) -> AbstractContextManager[None]:
        """Return a context with the level and the overrides, for a hook of the backward pass."""
        return self.reenter(self)

    drew: bool = False
    """True if a single random number was drawn for each row; answers may depend on it."""

    hooked_views: set[str] = field(default_factory=set)
    """The leaves of which a view has a hook, which has to see the gradient of that view."""

    used_views: set[str] = field(default_factory=set)
    """The leaves of which an override used a view, whose gradient then never exists."""

    def __post_init__(self) -> None:
        """Index the leaves by identity."""
        leaves = self.tape.leaves
        values = self.values or {
            n: rows.detach()[0] for n, rows in leaves.items() if is_shared(rows)
        }
        self._leaves = {
            id(leaves[name]): Weight(value, leaves[name], name, self.moves.get(name))
            for name, value in values.items()
        }
        self._own: dict[str, Tensor] = {}
        self.replaces = bool(self.moves) or bool(self.tape.sharded.leaves)

    def adopt_checkpoint(self) -> None:
        """Let a checkpoint that the loss has entered run its function again in this pass."""
        self.checkpoints.adopt(self._run_again)

    def _run_again(self) -> AbstractContextManager[None]:
        return self.rerun(self)

    def again(self) -> Host:
        """Return the host of a part of the pass that runs again, and records nothing on the tape.

        Running statistics are read at the end of the first run, so further updates are lost.
        """
        found = copy.copy(self)
        found.tape = self.tape.apart()
        found.drew = False  # what was drawn later must not refuse a question
        if self.tape.sharded.leaves:
            found._own = {}
        return found

    def release(self) -> None:
        """Let go of the gathered values that the graph does not hold, after the forward pass."""
        for name in self.tape.sharded.leaves:
            self._own.pop(name, None)

    def batched(self, *values: Any) -> bool:
        """Return whether some value differs between rows, judged by its type."""
        return any(map(self.level.batched, values))

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
        rows = self.level.rows_of(value)
        if rows is None:
            return Weight(value, None, None)
        found = self._leaves.get(id(rows))
        if found is not None:
            return found if moves or found.move is None else None
        return Weight(rows.detach()[0], rows, None) if is_shared(rows) else None

    def viewed(self, value: Tensor) -> tuple[Weight, tuple[int | None, ...]] | None:
        """Return a parameter that all rows share, and its dim behind every dim of the value.

        Where the value is a leaf with dims in another order, or repeated by ``expand``, the
        parameter is that leaf, and a dim that is not the leaf's is None. Call `use_view` if an
        override uses it.
        """
        weight = self.weight(value)
        if weight is None or weight.leaf is not None or weight.rows is None:
            return None if weight is None else (weight, tuple(range(value.ndim)))
        rows = weight.rows
        leaf = self._leaves.get(id(rows._base))
        if leaf is not None and leaf.rows is not None and leaf.leaf not in self.hooked_views:
            dims = _dims_of_view(rows, leaf.rows)
            if dims is not None and rows.requires_grad:
                return leaf, dims
        return weight, tuple(range(value.ndim))

    def use_view(self, value: Tensor, weight: Weight) -> None:
        """Note that an override uses a leaf instead of a view of it."""
        if weight.leaf is not None and weight.rows is not self.level.lower(value):
            self.used_views.add(weight.leaf)

    def hook_on(self, rows: Tensor) -> None:
        """Note a hook on a tensor (M, ...), which may be a view of a leaf.

        Raises:
            RuntimeError: An override has used the leaf instead.
        """
        leaf = self._leaves.get(id(rows._base))
        if leaf is None or leaf.leaf is None:
            return
        if leaf.leaf in self.used_views:
            raise RuntimeError(
                f"a hook on a view of parameter {leaf.leaf!r} cannot run over all rows at once "
                "after the view was used. Register it before"
            )
        self.hooked_views.add(leaf.leaf)

    def weights(
        self, *values: Tensor | None, moves: bool = False
    ) -> tuple[Weight | None, ...] | None:
        """Apply `weight` to every value that is not None; None if rows have their own of any."""
        found: list[Weight | None] = []
        for value in values:
            weight = None if value is None else self.weight(value, moves=moves)
            if weight is None and value is not None:
                return None
            found.append(weight)
        return tuple(found)

    def own(self, value: Any) -> Any:
        """Return the values of all rows in place of a leaf that moves or is sharded.

        Overrides that use `Weight` know both, and other functions would read nothing there.
        """
        if not self.replaces or not self.level.batched(value):
            return value
        weight = self._leaves.get(id(self.level.lower(value)))
        if weight is None or weight.leaf is None or weight.rows is None:
            return value
        if weight.move is None and isinstance(weight.source, Tensor):
            return value
        if weight.leaf not in self._own:
            # The first use may be one without gradients.
            with self.level.on_all_rows(), torch.enable_grad():
                rows = own_rows(weight.rows, self._values(weight))
            self._own[weight.leaf] = self.level.wrap(rows)
        return self._own[weight.leaf]

    def _values(self, weight: Weight) -> Tensor:
        """Return the values of all rows of a leaf. (M, *shape)."""
        assert weight.leaf is not None
        self.tape.expect_grad(weight.leaf)
        if weight.move is not None:
            return self.moved_values(weight)
        return weight.value.expand(self.level.rows, *weight.shape)

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
        product: ProductSize | None = None,
    ) -> None:
        """Note one use of a leaf for the choice of modes."""
        if weight is not None and weight.leaf is not None:
            self.tape.uses.append(Use(weight.leaf, override, flops, kept, ghost_flops, product))

    def used_in_product(
        self, override: str, weight: Weight | None, size: ProductSize, element_size: int
    ) -> None:
        """Note one use of a leaf whose factor is an `OuterFactor`."""
        n, p, d = size.rows * size.n, size.p, size.d
        kept = n * (p + d) * element_size
        self.used(override, weight, 2 * n * p * d, kept, ghost_flops(*size), size)


def _dims_of_view(view: Tensor, leaf: Tensor) -> tuple[int | None, ...] | None:
    """Return the leaf's dim behind each dim of a view (M, ...); None if the view is another one."""
    if view.storage_offset() != leaf.storage_offset() or view.dtype != leaf.dtype:
        return None
    left = {(size, step): dim for dim, (size, step) in enumerate(_extents(leaf))}
    if len(left) < leaf.ndim - 1 or any(size == 1 or step == 0 for size, step in left):
        return None
    dims: list[int | None] = []
    for size, step in _extents(view):
        repeats = size == 1 or step == 0
        if not repeats and (size, step) not in left:
            return None
        dims.append(None if repeats else left.pop((size, step)))
    return None if left else tuple(dims)


def _extents(rows: Tensor) -> list[tuple[int, int]]:
    """Return the size and the stride of every dim but the first."""
    return list(zip(rows.shape[1:], rows.stride()[1:], strict=True))


def in_autocast(x: Tensor, *weights: Weight | None) -> tuple[Any, ...]:
    """Cast the operands of a matrix product as autocast does; add a context without autocast."""
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return (x, *weights, _tree.NO_CHANGE)
    cast = [w and (w.to(dtype) if w.dtype.is_floating_point else w) for w in weights]
    return (x.to(dtype), *cast, torch.autocast(x.device.type, enabled=False))
