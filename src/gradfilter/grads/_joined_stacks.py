"""Build stacks from other stacks: join leaves of several, or select between two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._stack import GradStack, check_same_leaves, copied

T = TypeVar("T")


class StackOfParts(GradStack):
    """The base class of stacks that consist of other stacks.

    Attributes:
        parts: These stacks.
    """

    parts: tuple[GradStack, ...]

    @override
    def mean_over_ranks(self, tree: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.parts[0].mean_over_ranks(tree)

    @override
    def explain(self) -> str:
        return "\n".join(part.explain() for part in self.parts)

    @override
    def release(self) -> None:
        for part in self.parts:
            part.release()


@copied("losses")
@dataclass(frozen=True, eq=False, repr=False)
class JoinedStack(StackOfParts):
    """J = [J_1, J_2, ...], made by `join`."""

    parts: tuple[GradStack, ...]
    losses: Tensor | None
    buffers: Tree
    aux: Any

    @override
    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for part in self.parts for name, shape in part.shapes.items()}

    @property
    @override
    def live(self) -> Tensor:
        """A mask of the rows that take part in every part. (M,) bool."""
        return torch.stack([part.live for part in self.parts]).all(0)

    @override
    def gram_is_cheap(self) -> bool:
        return all(part.gram_is_cheap() for part in self.parts)

    @override
    def gram(self) -> Tensor:
        return torch.stack([part.gram() for part in self.parts]).sum(0)

    @override
    def combine(self, weights: Tensor) -> Tree:
        return {name: g for part in self.parts for name, g in part.combine(weights).items()}

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        return {name: g for part in self.parts for name, g in part.sum_squares(weights).items()}

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        check_same_leaves(self.shapes, tree, "dot")
        return torch.stack(
            [part.dot({name: tree[name] for name in part.shapes}) for part in self.parts]
        ).sum(0)

    @override
    def sq_norms(self) -> Tensor:
        return torch.stack([part.sq_norms() for part in self.parts]).sum(0)

    @override
    def stacked(self) -> Tree:
        return {name: g for part in self.parts for name, g in part.stacked().items()}

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        reduced = [part.reduce_columns(function) for part in self.parts]
        return {name: g for tree in reduced for name, g in tree.items()}

    @override
    def scaled(self, factors: Tensor) -> GradStack:
        return join(*(part.scaled(factors) for part in self.parts))

    @override
    def columns(self, names: Collection[str]) -> GradStack:
        chosen = [
            (part, [name for name in part.shapes if name in set(names)]) for part in self.parts
        ]
        return join(*(part.columns(own) for part, own in chosen if own))

    @override
    def first(self, count: int) -> GradStack:
        return join(*(part.first(count) for part in self.parts))

    @override
    def like(self, stack: GradStack) -> GradStack:
        return join(*(part.like(stack) for part in self.parts))

    @override
    def at(self, params: Params) -> GradStack:
        return join(*(part.at(params) for part in self.parts))

    @override
    def at_rows(self, params: Tree) -> GradStack:
        return join(*(part.at_rows(params) for part in self.parts))

    @override
    def _points(self, factors: Tensor) -> Tree:
        return {name: p for part in self.parts for name, p in part._points(factors).items()}


def join(*parts: GradStack) -> GradStack:
    """Join the leaves of several stacks with the same rows."""
    first = parts[0]
    return JoinedStack(parts, first.losses, first.buffers, first.aux)


@copied("losses")
@dataclass(frozen=True, eq=False, repr=False)
class SelectedStack(GradStack):
    """One of two stacks, selected by a bool tensor; made by `choose`."""

    when: Tensor
    new: GradStack
    old: GradStack
    losses: Tensor | None
    buffers: Tree
    aux: Any

    def _pick(self, new: T, old: T) -> T:
        return _tree.select(self.when, new, old)

    @override
    def mean_over_ranks(self, tree: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.new.mean_over_ranks(tree)

    @override
    def __len__(self) -> int:
        return len(self.old)

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return self.old.shapes

    @property
    @override
    def live(self) -> Tensor:
        """A mask of the rows that take part in the chosen stack. (M,) bool."""
        return self._pick(self.new.live, self.old.live)

    @override
    def gram_is_cheap(self) -> bool:
        return self.new.gram_is_cheap() and self.old.gram_is_cheap()

    @override
    def explain(self) -> str:
        return f"one of two stacks:\n{self.new.explain()}\n{self.old.explain()}"

    @override
    def release(self) -> None:
        self.new.release()
        self.old.release()

    @override
    def gram(self) -> Tensor:
        return self._pick(self.new.gram(), self.old.gram())

    @override
    def combine(self, weights: Tensor) -> Tree:
        return self._pick(self.new.combine(weights), self.old.combine(weights))

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        return self._pick(self.new.sum_squares(weights), self.old.sum_squares(weights))

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        return self._pick(self.new.dot(tree), self.old.dot(tree))

    @override
    def sq_norms(self) -> Tensor:
        return self._pick(self.new.sq_norms(), self.old.sq_norms())

    @override
    def stacked(self) -> Tree:
        return self._pick(self.new.stacked(), self.old.stacked())

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        return self._pick(self.new.reduce_columns(function), self.old.reduce_columns(function))

    @override
    def scaled(self, factors: Tensor) -> GradStack:
        return choose(self.when, self.new.scaled(factors), self.old.scaled(factors))

    @override
    def columns(self, names: Collection[str]) -> GradStack:
        return choose(self.when, self.new.columns(names), self.old.columns(names))

    @override
    def first(self, count: int) -> GradStack:
        return choose(self.when, self.new.first(count), self.old.first(count))

    @override
    def like(self, stack: GradStack) -> GradStack:
        return choose(self.when, self.new.like(stack), self.old.like(stack))

    @override
    def at(self, params: Params) -> GradStack:
        return choose(self.when, self.new.at(params), self.old.at(params))

    @override
    def at_rows(self, params: Tree) -> GradStack:
        return choose(self.when, self.new.at_rows(params), self.old.at_rows(params))

    @override
    def along(self, factors: Tensor) -> GradStack:
        return choose(self.when, self.new.along(factors), self.old.along(factors))

    @override
    def _points(self, factors: Tensor) -> Tree:
        return self._pick(self.new._points(factors), self.old._points(factors))


def choose(when: Tensor, new: GradStack, old: GradStack) -> GradStack:
    """Return ``new`` where a bool tensor is true, else ``old``, without waiting for the device.

    Buffers and aux are those of ``old``, the pass over the batch.
    """
    known = new.losses is not None and old.losses is not None
    losses = _tree.select(when, new.losses, old.losses) if known else None
    return SelectedStack(when.clone(), new, old, losses, old.buffers, old.aux)
