"""Run the transforms up to the reducer on some of the rows at a time, and hold one sum of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfilter._row_rules import RowRules
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._row_parts import (
    PartedStack,
    RunningSum,
    cat_numbers,
    cat_trees,
    without_rows,
)
from gradfilter.grads._stack import GradStack, mean_of


@dataclass(frozen=True, eq=False)
class RowPart:
    """The transforms of a chain up to its reducer, all of which act row by row.

    Attributes:
        parts: The transforms by name, in their order.
        rows_are_read: True if a transform behind the reducer may use ``rows``.
        more_rules: The rules of those that have none of their own, by name.
    """

    parts: Mapping[str, Transform]
    rows_are_read: bool
    more_rules: Mapping[str, RowRules]

    @property
    def rules(self) -> dict[str, RowRules]:
        """The rules of the transforms, by name."""
        own = {name: part.row_rules for name, part in self.parts.items()}
        found = {name: rules or self.more_rules.get(name) for name, rules in own.items()}
        return {name: rules for name, rules in found.items() if rules is not None}

    @property
    def follows_reference(self) -> bool:
        """True if a part can be reduced only when the reference gradient is known."""
        return any("reference" in (rules.reads or ()) for rules in self.rules.values())


@dataclass(frozen=True)
class PartResult:
    """What a part of the rows has given, in addition to its gradient.

    Attributes:
        outs: The published values of every transform.
        divisor: The divisor of the reducer, () float, or None.
        losses: The losses (M,), or None.
        live: The rows that took part before the first transform. (M,) bool
        aux: The aux of the rows.
        rows: The reduced rows, which are not in memory; None if no transform reads them.
    """

    outs: dict[str, Out]
    divisor: Tensor | None
    losses: Tensor | None
    live: Tensor
    aux: Any
    rows: GradStack | None


@dataclass(frozen=True)
class ReducedPart:
    """A part of the rows after the reducer.

    Attributes:
        grads: The result of the reducer for these rows.
        result: What they have given in addition to it.
        states: The new state of every transform up to the reducer.
        buffers: The buffers after these rows.
    """

    grads: Tree
    result: PartResult
    states: dict[str, State]
    buffers: Tree


@dataclass(eq=False)
class ReducedRows:
    """The rows of a step that were reduced part by part. A chain takes it in place of a stack.

        add --> ... --> add --> the chain runs the transforms behind the reducer

    Holds one gradient, and a few numbers per row. A part whose rows are refused changes nothing.

    Attributes:
        row_part: The transforms up to the reducer.
        state: The state of the chain before the step.
        params: The parameters at which all rows are taken.
        extra: The caller's keywords.
        buffers: The buffers after the last part.
        total: The sum of the gradients of the parts, each times its divisor.
        results: What else the parts have given.
    """

    row_part: RowPart
    state: State
    params: Params
    extra: Mapping[str, Any]
    buffers: Tree = field(default_factory=dict)
    total: RunningSum = field(default_factory=RunningSum)
    results: list[PartResult] = field(default_factory=list)
    _states: dict[str, State] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.results)

    def add(self, rows: GradStack) -> None:
        """Reduce the next rows, and free what they hold."""
        self.total.check(rows.shapes)
        self.append(self.reduce(rows))

    def reduce(self, rows: GradStack) -> ReducedPart:
        """Return the next rows after the reducer, without adding them; free what they hold."""
        first, values = rows, {k: v for k, v in self.extra.items() if k != "keep"}
        states: dict[str, State] = {}
        outs: dict[str, Out] = {}
        grads: Any = rows
        all_rules = self.row_part.rules
        for name, rules in all_rules.items():
            rows = grads
            context = Context(rules.seen(values))
            compute = self.row_part.parts[name].compute
            grads, states[name], out = compute(rows, self.state[name], self.params, context)
            later = rules.for_later(out)
            values |= {f"{name}/{key}": value for key, value in later.items()}
            outs[name] = out
        reducer, rules = [*all_rules.items()][-1]
        divisor = rules.divisor_of(rows, outs[reducer])
        result = PartResult(
            outs,
            divisor,
            first.losses,
            first.live,
            first.aux,
            without_rows(rows) if self.row_part.rows_are_read else None,
        )
        first.release()
        return ReducedPart(grads, result, states, first.buffers)

    def append(self, part: ReducedPart) -> None:
        """Add the result of `reduce` to those of the parts before.

        Raises:
            ValueError: It has other leaves, or aux of another shape.
        """
        self.total.check(part.grads)
        cat_trees([given.aux for given in (*self.results[:1], part.result)])
        self.total.add(part.grads, part.result.divisor)
        self.results.append(part.result)
        self._states, self.buffers = part.states, part.buffers

    @property
    def losses(self) -> Tensor | None:
        """The losses of all rows, or None if they are not known. (M,)."""
        return cat_numbers([part.losses for part in self.results])

    @property
    def aux(self) -> Any:
        """The aux of all rows."""
        return cat_trees([part.aux for part in self.results])

    def mean_loss(self) -> Tensor | None:
        """Return the mean of the losses of the rows that take part, or None without losses. ()."""
        losses = self.losses
        live = torch.cat([part.live for part in self.results])
        return None if losses is None else mean_of(losses, live)

    def rows(self) -> GradStack | None:
        """Return the rows for transforms behind the reducer; None if no transform reads them."""
        rows = [part.rows for part in self.results if part.rows is not None]
        return PartedStack(rows) if rows else None

    def grads(self) -> Tree:
        """Return the result of the reducer for all rows."""
        return self.total.rounded(self._divisor())

    def published(self) -> Iterator[tuple[str, State, Out]]:
        """Yield every transform up to the reducer: name, new state and published values."""
        sizes = [len(part.live) for part in self.results]
        for name, rules in self.row_part.rules.items():
            outs = [part.outs[name] for part in self.results]
            joined = rules.joined(outs, sizes)
            for key in outs[-1].keys() - joined.keys():
                joined[key] = self._shares([out[key] for out in outs])
            state = self._states[name]
            if rules.observe is not None:
                state = rules.observe(self.state[name], joined)
            yield name, state, {key: joined[key] for key in outs[-1]}

    def check_keywords(self, values: Mapping[str, Any]) -> None:
        """Refuse other keywords than those that the parts were reduced with.

        Raises:
            ValueError: A transform up to the reducer reads a keyword that has another value.
        """
        for name, rules in self.row_part.rules.items():
            before, now = (rules.seen(given) for given in (self.extra, values))
            for key in sorted((before.keys() | now.keys()) - {"keep"}):
                if not _same(before.get(key), now.get(key)):
                    raise ValueError(
                        f"{name}: expected the keyword {key!r} with one value for all rows of a "
                        "step, found another one, or none, where earlier rows were accumulated. "
                        f"Pass the same object each time: accumulate(..., {key}=...)."
                    )

    def _divisor(self) -> Tensor | None:
        """Return the divisor of all rows, 1 if no row takes part. ()."""
        found = [part.divisor for part in self.results if part.divisor is not None]
        if not found:
            return None
        total = torch.stack(found).sum()
        return torch.where(total == 0, 1, total)

    def _shares(self, weights: list[Tensor]) -> Tensor:
        """Join the weights of all parts."""
        divisor = self._divisor()
        if divisor is None:
            return torch.cat(weights)
        pairs = zip(weights, self.results, strict=True)
        scaled = [own if part.divisor is None else own * part.divisor for own, part in pairs]
        return torch.cat(scaled) / divisor


def _same(a: Any, b: Any) -> bool:
    """Return whether two keywords are the same, without reading the value of a tensor."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):  # a tree, such as the reference
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
