"""The rows of several batches as one stack: held together, or computed again part by part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._joined_stacks import JoinedStack, SelectedStack, StackOfParts, choose, join
from gradfilter.grads._stack import (
    BaseStack,
    DenseStack,
    GradStack,
    StackOrigin,
    check_per_row,
    check_shapes,
    first_rows,
)
from gradfilter.grads.fused._fused_stack import FusedStack

T = TypeVar("T")

# --- Numbers of all parts ---


def cat_trees(trees: Sequence[Any]) -> Any:
    """Concatenate trees of one value per row, such as aux; None if the first is None.

    Raises:
        ValueError: Leaves have other shapes in some of the batches.
    """
    return None if trees[0] is None else _tree.tree_map(_cat, *trees)


def _cat(first: Tensor, *rest: Tensor) -> Tensor:
    for other in rest:
        if other.shape[1:] != first.shape[1:]:
            raise ValueError(
                "Expected aux of the same shape from the rows of every accumulated batch, found "
                f"the shapes {tuple(first.shape)} and {tuple(other.shape)}. Reduce it over the "
                "samples, or accumulate batches of one size."
            )
    return torch.cat([first, *rest])


def cat_numbers(numbers: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate one number per row of every part, or return None if a part has none."""
    given = [part for part in numbers if part is not None]
    return torch.cat(given) if len(given) == len(numbers) else None


def check_same_names(first: Collection[str], other: Collection[str]) -> None:
    """Refuse parts whose rows have other leaves.

    Raises:
        ValueError: The leaves differ.
    """
    if set(first) != set(other):
        raise ValueError(
            "Expected the same trainable parameters in every accumulated batch, found "
            f"{sorted(set(first) ^ set(other))} in some only. Freeze and unfreeze after step()."
        )


# --- All rows held ---


def dense_rows(rows: GradStack, factors: Tensor | None = None) -> DenseStack:
    """Return the rows themselves, without activations.

    Args:
        rows: A stack that has not been scaled.
        factors: The factors (M,) to scale it with.

    Raises:
        ValueError: The parameters are sharded over ranks.
    """
    if isinstance(rows, FusedStack) and rows.sharded.leaves:
        raise ValueError(
            "Expected all rows of a step from one batch that they divide evenly, because the "
            "parameters are sharded over ranks (DTensor), found rows in several parts. Leave out "
            "rows_at_once= and uneven=, and lower memory_budget= to hold less."
        )
    origin = rows.origin if isinstance(rows, BaseStack) else None
    dense = DenseStack(rows.stacked(), rows.losses, rows.buffers, rows.aux, factors, origin)
    rows.release()
    return dense


def join_stacks(parts: Sequence[DenseStack]) -> DenseStack:
    """Join the rows of all parts in order; each part is computed again on its own batch.

    Args:
        parts: Stacks on the same leaves, taken at the same parameters.

    Raises:
        ValueError: The leaves differ.
    """
    for part in parts[1:]:
        check_same_names(parts[0].rows, part.rows)
    origins = [cast(StackOrigin, part.origin) for part in parts]  # rows of a batch have one
    sizes = [len(part) for part in parts]

    def evaluate(params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]) -> GradStack:
        pieces = _cut(params, sizes) if per_row else [params] * len(sizes)
        return join_stacks(
            [
                dense_rows(origin.evaluate(piece, per_row, kept))
                for origin, piece in zip(origins, pieces, strict=True)
            ]
        )

    def check(names: Collection[str]) -> None:
        for origin in origins:
            origin.check(names)

    return DenseStack(
        {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
        cat_numbers([part.losses for part in parts]),
        parts[-1].buffers,
        cat_trees([part.aux for part in parts]),
        scale=cat_numbers([part.scale for part in parts]),
        origin=StackOrigin(sum(sizes), origins[0].params, evaluate, check=check),
    )


def _cut(params: Mapping[str, Tensor], sizes: list[int]) -> list[Params]:
    """Split parameters with a leading axis M into those of the rows of every part."""
    cuts = zip(*(torch.split(leaf, sizes) for leaf in params.values()), strict=True)
    return [dict(zip(params, cut, strict=True)) for cut in cuts]


# --- No rows held: they are computed again when they are asked for ---


def without_rows(stack: GradStack) -> GradStack:
    """Return the same stack without rows in memory, if they can be computed again."""
    stack.release()
    if isinstance(stack, JoinedStack):
        return join(*map(without_rows, stack.parts))
    if isinstance(stack, SelectedStack):
        return choose(stack.when, without_rows(stack.new), without_rows(stack.old))
    if not isinstance(stack, DenseStack) or stack.origin is None:
        return stack
    if stack.origin.per_row:
        return stack  # every row has its own parameters, which take as much memory
    numbers = _PassNumbers(stack.losses, stack.buffers, stack.aux, stack._empty())
    return RepeatedStack(stack.origin, tuple(stack.rows), len(stack), stack.scale, numbers)


def moved(stack: GradStack, params: Params) -> GradStack:
    """Return the rows at other parameters, computed when they are asked for and not held."""
    if not isinstance(stack, BaseStack):
        return without_rows(stack.at(params))
    origin = stack.known_origin("at", params)
    if origin.per_row:
        return without_rows(stack.at(params))
    check_shapes({name: p.shape for name, p in origin.params.items()}, params, "at")
    there = {**origin.params, **params}
    again = StackOrigin(origin.rows, there, _Elsewhere(origin, there.keys() - params.keys()))
    return RepeatedStack(again, tuple(stack.shapes), len(stack), stack.scale, None)


@dataclass(frozen=True)
class _Elsewhere:
    """The evaluation of a stack that begins at moved parameters.

    Attributes:
        origin: That of the stack before.
        kept: The parameters that were not moved.
    """

    origin: StackOrigin
    kept: Collection[str]

    def __call__(
        self, params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> GradStack:
        return self.origin.evaluate(params, per_row, [name for name in kept if name in self.kept])


class _PassNumbers(NamedTuple):
    """What a pass gives in addition to the rows: see `DenseStack`."""

    losses: Tensor | None
    buffers: Tree
    aux: Any
    empty: Tensor | None


class RepeatedStack(BaseStack):
    """A stack that holds no rows, and computes them again at every question.

    Args:
        origin: The way to compute the rows.
        names: The leaves.
        count: The number of rows.
        scale: The factors (M,), or None.
        numbers: Those of the pass; None to take them from the first question that is asked.
    """

    def __init__(
        self,
        origin: StackOrigin,
        names: tuple[str, ...],
        count: int,
        scale: Tensor | None,
        numbers: _PassNumbers | None,
    ) -> None:
        self.origin, self._way = origin, origin  # the second is never None
        self.scale, self._names, self._count, self._numbers = scale, names, count, numbers

    def __getattr__(self, name: str) -> Any:
        """Return the losses, buffers or aux; compute them if no question was asked before."""
        if name not in ("losses", "buffers", "aux"):
            raise AttributeError(name)
        value = getattr(self._known(), name)
        return value.clone() if isinstance(value, Tensor) else value

    def _known(self) -> _PassNumbers:
        if self._numbers is None:
            self._computed().release()
        assert self._numbers is not None
        return self._numbers

    def _computed(self) -> GradStack:
        """Compute the rows, and remember the numbers of their pass."""
        origin = self._way
        stack = origin.evaluate(origin.params, False, list(origin.params))
        stack = stack.first(self._count) if self._count < len(stack) else stack
        if self._numbers is None:
            empty = stack._empty() if isinstance(stack, BaseStack) else None
            self._numbers = _PassNumbers(stack.losses, stack.buffers, stack.aux, empty)
        return self.like(stack)

    def _replaced(self, **changed: Any) -> RepeatedStack:
        given = {
            "origin": self._way,
            "names": self._names,
            "count": self._count,
            "scale": self.scale,
            "numbers": self._numbers,
        }
        return RepeatedStack(**{**given, **changed})

    @override
    def __len__(self) -> int:
        return self._count

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return {name: self._way.params[name].shape for name in self._names}

    @property
    @override
    def device(self) -> torch.device:
        return _tree.device_of(self._way.params)

    @override
    def _empty(self) -> Tensor | None:
        return self._known().empty

    @override
    def release(self) -> None:
        """Do nothing, because nothing is held."""

    @override
    def gram(self) -> Tensor:
        return self._computed().gram()

    @override
    def combine(self, weights: Tensor) -> Tree:
        return self._computed().combine(weights)

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        return self._computed().dot(tree)

    @override
    def sq_norms(self) -> Tensor:
        return self._computed().sq_norms()

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        return self._computed().sum_squares(weights)

    @override
    def stacked(self) -> Tree:
        return self._computed().stacked()

    @override
    def leaf_grams(self) -> Tree:
        return self._computed().leaf_grams()

    @override
    def combine_leaves(self, weights: Mapping[str, Tensor]) -> Tree:
        return self._computed().combine_leaves(weights)

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        return self._computed().reduce_columns(function)

    @override
    def _scaled(self, scale: Tensor) -> RepeatedStack:
        return self._replaced(scale=scale)

    @override
    def _columns(self, names: Collection[str]) -> RepeatedStack:
        return self._replaced(names=tuple(name for name in self._names if name in names))

    @override
    def _first(self, count: int) -> RepeatedStack:
        losses, buffers, aux, empty = self._known()
        losses, aux, scale, empty = first_rows((losses, aux, self.scale, empty), count)
        numbers = _PassNumbers(losses, buffers, aux, empty)
        return self._replaced(count=count, scale=scale, numbers=numbers)


class PartedStack(StackOfParts):
    """J = [J_1; J_2; ...]: the rows of several batches, asked one batch after another.

    Only `gram`, which compares all rows, and `stacked` hold the rows of all batches together.

    Args:
        parts: The rows of each batch, in order, made by `without_rows` or `moved`.
    """

    def __init__(self, parts: Sequence[GradStack]) -> None:
        self.parts = tuple(parts)

    def __getattr__(self, name: str) -> Any:
        """Return the losses, buffers or aux of all batches."""
        if name == "losses":
            return cat_numbers(self._ask(lambda part: part.losses))
        if name == "buffers":
            return self.parts[-1].buffers
        if name == "aux":
            return cat_trees(self._ask(lambda part: part.aux))
        raise AttributeError(name)

    def _ask(self, question: Callable[[GradStack], T]) -> list[T]:
        """Ask every part, and free what it computed before the next is asked."""
        return [self._answer(part, question) for part in self.parts]

    @staticmethod
    def _answer(part: GradStack, question: Callable[[GradStack], T]) -> T:
        answer = question(part)
        part.release()
        return answer

    def _split(self, per_row: Tensor) -> list[Tensor]:
        return list(torch.split(per_row, [len(part) for part in self.parts]))

    @override
    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return self.parts[0].shapes

    @property
    @override
    def live(self) -> Tensor:
        """A mask of the rows that take part. (M,) bool."""
        return torch.cat(self._ask(lambda part: part.live))

    @override
    def gram_is_cheap(self) -> bool:
        """Return False: the Gram holds the rows of all batches together."""
        return False

    @override
    def gram(self) -> Tensor:
        return DenseStack(self.stacked()).gram()

    @override
    def combine(self, weights: Tensor) -> Tree:
        return self._summed(weights, lambda part, own: part.combine(own))

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        return self._summed(weights, lambda part, own: part.sum_squares(own))

    def _summed(self, weights: Tensor, question: Callable[[GradStack, Tensor], Tree]) -> Tree:
        """Sum the answers of all parts, given the weights of their rows."""
        check_per_row("weight", weights, len(self))
        total = RunningSum()
        for part, own in zip(self.parts, self._split(weights), strict=True):
            total.add(question(part, own))
            part.release()
        return total.rounded()

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(self._ask(lambda part: part.dot(tree)))

    @override
    def sq_norms(self) -> Tensor:
        return torch.cat(self._ask(lambda part: part.sq_norms()))

    @override
    def stacked(self) -> Tree:
        found = self._ask(lambda part: part.stacked())
        return {name: torch.cat([rows[name] for rows in found]) for name in self.shapes}

    @override
    def scaled(self, factors: Tensor) -> GradStack:
        check_per_row("factor", factors, len(self))
        pairs = zip(self.parts, self._split(factors), strict=True)
        return PartedStack([part.scaled(own) for part, own in pairs])

    @override
    def columns(self, names: Collection[str]) -> GradStack:
        return PartedStack([part.columns(names) for part in self.parts])

    @override
    def first(self, count: int) -> GradStack:
        if not 1 <= count <= len(self):
            raise ValueError(f"Expected 1 <= count <= M = {len(self)}, found count={count}.")
        found: list[GradStack] = []
        for part in self.parts:
            if count > 0:
                found.append(part.first(min(count, len(part))))
            count -= len(part)
        return PartedStack(found)

    @override
    def like(self, stack: GradStack) -> GradStack:
        if isinstance(stack, PartedStack):
            pairs = zip(self.parts, stack.parts, strict=False)
            return PartedStack([part.like(other) for part, other in pairs])
        scales = [part.scale for part in self.parts if isinstance(part, BaseStack)]
        if len(scales) < len(self.parts):
            raise ValueError(
                "Expected rows at other parameters from the rows of each batch, found a stack of "
                f"{len(stack)} rows for batches of {[len(part) for part in self.parts]}, of which "
                "some leaves or factors were chosen separately. Leave grad_fn out."
            )
        if len(self) < len(stack):
            stack = stack.first(len(self))
        if set(self.shapes) < set(stack.shapes):
            stack = stack.columns(list(self.shapes))
        if all(scale is None for scale in scales):
            return stack
        factors = [
            torch.ones(len(part), dtype=_tree.sum_dtype(part.live), device=part.live.device)
            if scale is None
            else scale
            for part, scale in zip(self.parts, scales, strict=True)
        ]
        return stack.scaled(torch.cat(factors))

    @override
    def at(self, params: Params) -> GradStack:
        return PartedStack([moved(part, params) for part in self.parts])

    @override
    def at_rows(self, params: Tree) -> GradStack:
        pieces = _cut(params, [len(part) for part in self.parts])
        pairs = zip(self.parts, pieces, strict=True)
        return PartedStack([part.at_rows(own) for part, own in pairs])

    @override
    def along(self, factors: Tensor) -> GradStack:
        check_per_row("factor", factors, len(self))
        pairs = zip(self.parts, self._split(factors), strict=True)
        return PartedStack([part.along(own) for part, own in pairs])

    @override
    def _points(self, factors: Tensor) -> Tree:
        pairs = zip(self.parts, self._split(factors), strict=True)
        found = [part._points(own) for part, own in pairs]
        return {name: torch.cat([points[name] for points in found]) for name in self.shapes}


# --- A stack without rows as a tree of tensors, which one graph returns and another takes ---


def as_tensors(stack: GradStack, origin: StackOrigin | None) -> dict[str, Any]:
    """Return a stack as a tree of tensors, without its rows.

    Args:
        stack: A stack whose rows can be computed again.
        origin: The way to compute the rows of the batch.

    Raises:
        RuntimeError: The stack has another origin: rows at other parameters, for example.
    """
    if isinstance(stack, JoinedStack):
        return {"joined": [as_tensors(part, origin) for part in stack.parts]}
    if isinstance(stack, SelectedStack):
        pair = {"new": as_tensors(stack.new, origin), "old": as_tensors(stack.old, origin)}
        return {"when": stack.when, **pair}
    if not isinstance(stack, BaseStack) or origin is None or stack.origin is not origin:
        raise RuntimeError(
            "Expected the rows of the batch, chosen or scaled, from the transforms up to the "
            f"reducer, found {type(stack).__name__} at other parameters or of another batch: a "
            "later graph cannot compute them again. Use larger batches, or do not compile."
        )
    return {
        "leaves": {name: {} for name in stack.shapes},
        "scale": stack.scale,
        "losses": stack.losses,
        "aux": stack.aux,
        "empty": stack._empty(),
    }


def from_tensors(tree: Mapping[str, Any], origin: StackOrigin) -> GradStack:
    """Return the stack that `as_tensors` took apart, with the same origin in another graph."""
    if "joined" in tree:
        return join(*(from_tensors(part, origin) for part in tree["joined"]))
    if "when" in tree:
        pair = [from_tensors(tree[key], origin) for key in ("new", "old")]
        return choose(tree["when"], *pair)
    numbers = _PassNumbers(tree["losses"], {}, tree["aux"], tree["empty"])
    count = len(tree["losses"])
    return RepeatedStack(origin, tuple(tree["leaves"]), count, tree["scale"], numbers)


# --- One sum, to which the parts are added ---


class RunningSum:
    """A weighted sum of trees, in float32 or wider, that holds one tree.

    Args:
        total: The sum of the trees that were added before; `add` writes into it.
    """

    def __init__(self, total: Tree | None = None) -> None:
        self._total: Tree = {} if total is None else total
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def total(self) -> Tree:
        """The sum itself, which the next `add` writes."""
        return self._total

    def check(self, tree: Mapping[str, Any]) -> None:
        """Refuse a tree with other leaves than those that were added.

        Raises:
            ValueError: The leaves differ.
        """
        if self._total:
            check_same_names(self._total, tree)

    def add(self, tree: Tree, weight: Tensor | None = None) -> None:
        """Add a tree, times a weight ()."""
        self._dtypes = {name: leaf.dtype for name, leaf in tree.items()}
        for name, leaf in tree.items():
            wide = _tree.at_least_float32(leaf)
            factor = None if weight is None else weight.to(wide.dtype)
            if name not in self._total:
                self._total[name] = wide.clone() if factor is None else wide * factor
            elif factor is None:
                self._total[name].add_(wide)
            else:
                self._total[name].addcmul_(wide, factor)

    def rounded(self, divisor: Tensor | None = None) -> Tree:
        """Return the sum, divided by a number (), in the dtypes of the trees."""
        total = self._total
        if divisor is not None:
            total = {name: leaf / divisor.to(leaf.dtype) for name, leaf in total.items()}
        return {name: leaf.to(self._dtypes[name]) for name, leaf in total.items()}
