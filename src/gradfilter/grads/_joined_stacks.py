"""Build stacks from other stacks: join leaves of several, or select between two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._stack import GradStack, check_same_leaves, copied

T = TypeVar("T")


@copied("losses")
@dataclass(frozen=True, eq=False, repr=False)
class JoinedStack(GradStack):
    """J = [J_1, J_2, ...], made by `join`."""

    parts: tuple[GradStack, ...]
    losses: Tensor | None
    buffers: Tree
    aux: Any

    def __len__(self) -> int:
        """Return M."""
        return len(self.parts[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the leaves of all parts, by name."""
        return {name: shape for part in self.parts for name, shape in part.shapes.items()}

    @property
    def live(self) -> Tensor:
        """A mask of the rows that take part in every part. (M,) bool."""
        return torch.stack([part.live for part in self.parts]).all(0)

    def gram_is_cheap(self) -> bool:
        """Return whether the Gram is cheap for every part."""
        return all(part.gram_is_cheap() for part in self.parts)

    def explain(self) -> str:
        """Return the texts of all parts."""
        return "\n".join(part.explain() for part in self.parts)

    def release(self) -> None:
        """Release every part."""
        for part in self.parts:
            part.release()

    def gram(self) -> Tensor:
        """Sum the Grams of the parts."""
        return torch.stack([part.gram() for part in self.parts]).sum(0)

    def combine(self, weights: Tensor) -> Tree:
        """Combine every part."""
        return {name: g for part in self.parts for name, g in part.combine(weights).items()}

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Sum the products of the parts."""
        check_same_leaves(self.shapes, tree, "dot")
        return torch.stack(
            [part.dot({name: tree[name] for name in part.shapes}) for part in self.parts]
        ).sum(0)

    def sq_norms(self) -> Tensor:
        """Sum the squared norms of the parts."""
        return torch.stack([part.sq_norms() for part in self.parts]).sum(0)

    def stacked(self) -> Tree:
        """Return the rows of every part."""
        return {name: g for part in self.parts for name, g in part.stacked().items()}

    def scaled(self, factors: Tensor) -> GradStack:
        """Scale every part."""
        return join(*(part.scaled(factors) for part in self.parts))

    def columns(self, names: Collection[str]) -> GradStack:
        """Return the chosen leaves of every part that has some."""
        chosen = [
            (part, [name for name in part.shapes if name in set(names)]) for part in self.parts
        ]
        return join(*(part.columns(own) for part, own in chosen if own))

    def first(self, count: int) -> GradStack:
        """Cut every part to its first rows."""
        return join(*(part.first(count) for part in self.parts))

    def like(self, stack: GradStack) -> GradStack:
        """Apply the cuts and factors of every part to another stack."""
        return join(*(part.like(stack) for part in self.parts))

    def at(self, params: Params) -> GradStack:
        """Evaluate every part at the same parameters."""
        return join(*(part.at(params) for part in self.parts))

    def at_rows(self, params: Tree) -> GradStack:
        """Evaluate every part at the same parameters for each row."""
        return join(*(part.at_rows(params) for part in self.parts))


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

    def __len__(self) -> int:
        """Return M."""
        return len(self.old)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the leaves, the same in both stacks."""
        return self.old.shapes

    @property
    def live(self) -> Tensor:
        """A mask of the rows that take part in the chosen stack. (M,) bool."""
        return self._pick(self.new.live, self.old.live)

    def gram_is_cheap(self) -> bool:
        """Return whether the Gram is cheap for both stacks."""
        return self.new.gram_is_cheap() and self.old.gram_is_cheap()

    def explain(self) -> str:
        """Return the texts of both stacks."""
        return f"one of two stacks:\n{self.new.explain()}\n{self.old.explain()}"

    def release(self) -> None:
        """Release both stacks."""
        self.new.release()
        self.old.release()

    def gram(self) -> Tensor:
        """Return the Gram of the chosen stack."""
        return self._pick(self.new.gram(), self.old.gram())

    def combine(self, weights: Tensor) -> Tree:
        """Combine the rows of the chosen stack."""
        return self._pick(self.new.combine(weights), self.old.combine(weights))

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Return the products of the chosen stack."""
        return self._pick(self.new.dot(tree), self.old.dot(tree))

    def sq_norms(self) -> Tensor:
        """Return the squared norms of the chosen stack."""
        return self._pick(self.new.sq_norms(), self.old.sq_norms())

    def stacked(self) -> Tree:
        """Return the rows of the chosen stack."""
        return self._pick(self.new.stacked(), self.old.stacked())

    def scaled(self, factors: Tensor) -> GradStack:
        """Scale both stacks."""
        return choose(self.when, self.new.scaled(factors), self.old.scaled(factors))

    def columns(self, names: Collection[str]) -> GradStack:
        """Cut both stacks to some leaves."""
        return choose(self.when, self.new.columns(names), self.old.columns(names))

    def first(self, count: int) -> GradStack:
        """Cut both stacks to their first rows."""
        return choose(self.when, self.new.first(count), self.old.first(count))

    def like(self, stack: GradStack) -> GradStack:
        """Apply the cuts and factors of both stacks to another one."""
        return choose(self.when, self.new.like(stack), self.old.like(stack))

    def at(self, params: Params) -> GradStack:
        """Evaluate both stacks at other parameters."""
        return choose(self.when, self.new.at(params), self.old.at(params))

    def at_rows(self, params: Tree) -> GradStack:
        """Evaluate both stacks at parameters of each row."""
        return choose(self.when, self.new.at_rows(params), self.old.at_rows(params))


def choose(when: Tensor, new: GradStack, old: GradStack) -> GradStack:
    """Return ``new`` where a bool tensor is true, else ``old``, without waiting for the device.

    Buffers and aux are those of ``old``, the pass over the batch.
    """
    known = new.losses is not None and old.losses is not None
    losses = _tree.select(when, new.losses, old.losses) if known else None
    return SelectedStack(when.clone(), new, old, losses, old.buffers, old.aux)
