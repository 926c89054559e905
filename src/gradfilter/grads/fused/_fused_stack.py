"""The stack of the fused plan: a lazy backward pass, and factors that answer every question."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._readable import readable
from gradfilter._shards import whole
from gradfilter._types import Tree
from gradfilter.grads._error_notes import note_anomaly, reason_of
from gradfilter.grads._module_tensors import Hook, apply_hooks
from gradfilter.grads._stack import (
    ComputedStack,
    GradStack,
    StackOrigin,
    check_per_row,
    check_same_leaves,
    copied,
    explain_fallback,
    first_rows,
    reduce_pieces,
    scale_rows,
    versions,
    written,
)
from gradfilter.grads.fused._along import Move, ParamsAlong
from gradfilter.grads.fused._factors import (
    JOINED,
    DenseFactor,
    Factor,
    TiledFactor,
    first_scaled,
    join_rows,
    join_uses,
    small_rows,
    split_joined,
)
from gradfilter.grads.fused._forward import Forward
from gradfilter.grads.fused._lift import autocast_dtype, untraced
from gradfilter.grads.fused._row_groups import GroupedFactor
from gradfilter.grads.fused._sharded_leaves import ShardedLeaves
from gradfilter.grads.fused._tape import MUCH_LARGER, Layer, LeafVisitor, Modes, choose_modes

# --- The rows of one pass, computed on demand ---


Question = Callable[[Factor, str], Tensor]

Finish = Callable[[str, Tensor], Tensor]
"""``finish(name, total)`` gets the sum over the rows of one leaf as soon as it is there.

With sharded parameters it adds up those of the ranks, and returns this rank's shard.
"""


class State(Enum):
    """The state of `LazyRows`: what of its pass is in memory."""

    GRAPH = "graph"
    FACTORS = "factors"
    RELEASED = "released"


class PassSource(ABC):
    """Gives a pass again after its graph was freed, or its rows in another way."""

    @abstractmethod
    def rerun(self) -> Forward:
        """Run the forward pass again, with the same random numbers."""

    @abstractmethod
    def fallback(self, refusal: Exception) -> Tree:
        """Compute the rows without the backward pass that was refused, or raise."""

    def backward_pass(self, run: Forward) -> AbstractContextManager[None]:
        """Return a context for a backward pass, in which hooks may draw random numbers."""
        return _tree.NO_CHANGE


@dataclass(frozen=True)
class SinglePass(PassSource):
    """A pass that answers one question, so that it never runs again."""

    forward: Forward

    @override
    def rerun(self) -> Forward:
        return self.forward

    @override
    def fallback(self, refusal: Exception) -> Tree:
        raise refusal


class LazyRows:
    """The rows of one forward pass, computed when they are asked for.

    The object is a state machine. A *question* is a call of `gram`, `sq_norms`, `dot`, `rows` or
    `total`; Grams and norms are cached, and a cached answer changes no state::

        start --> GRAPH --question--> FACTORS --question--> FACTORS
                    |                    |
                    |                    | release, or the user wrote into the rows
                    |                    v
                    +----------------> RELEASED --question--> as from GRAPH,
              release, or `total` of             after a new forward pass
              all leaves

    GRAPH: The forward pass has run, and its graph is held. A question runs the backward pass, which
    leaves one factor for every leaf. A `total` of all leaves takes one ordinary backward pass with
    weighted losses instead, and leaves nothing.

    FACTORS: The factors answer every question without a further pass.

    RELEASED: Nothing is held. The next question runs the forward pass again.

    Two cases differ. If the factors exceed the budget (``modes.keeps`` is False), every question
    takes a backward pass of its own and the state stays GRAPH; only a `total` of all leaves
    releases the graph, unless ``expect_more`` is set. If the backward pass is refused, the source
    gives the rows in another way, and they become the factors.

    Args:
        source: Gives the forward pass again.
        first: The forward pass that has run.
        budget: The bytes that may be held between questions.
        hooks: The hooks that the user registered on parameters, to be run on every row.
        lean: True to hold no rows that take much more memory than their factors; with sharded
            parameters, none that take more.
        absent: The rows that are known to be empty, (M,) bool, or None.

    Attributes:
        state: The present state.
        expect_more: True while norms, and no Gram, have been answered: clips ask for norms first
            and for several combinations later, so a combination must not free the graph.
    """

    def __init__(
        self,
        source: PassSource,
        first: Forward,
        budget: int,
        hooks: dict[str, list[Hook]] | None = None,
        *,
        lean: bool = False,
        absent: Tensor | None = None,
    ) -> None:
        self._source = source
        self.fallback = ""  # the reason why the loop has computed the rows
        # With a single row, autograd runs the hooks on the leaves themselves.
        self._hooks = (hooks or {}) if first.tape.alone is None else {}
        self._linear = first.tape.linear
        self.sharded = first.tape.sharded
        self.shapes = {name: leaf.shape[1:] for name, leaf in first.tape.leaves.items()}
        self._dtypes = {name: leaf.dtype for name, leaf in first.tape.leaves.items()}
        limit = 1 if first.tape.sharded.leaves else MUCH_LARGER
        self.modes: Modes = choose_modes(
            first.tape.leaves, first.tape.uses, budget, limit=limit if lean else math.inf
        )
        self.overrides = dict(first.tape.overrides)
        self.groups, self.by_row = first.groups, first.by_row
        self.moved, self.checkpointed = first.moved, first.checkpointed
        self.count = first.losses.shape[0]
        self._losses = first.losses.detach()
        self.device = first.losses.device
        self._absent, self._ignored = absent, first.tape.ignored
        if absent is not None:
            self._ignored = absent if self._ignored is None else absent | self._ignored
        wide = {torch.float32, torch.float64}
        self._half = autocast_dtype(self.device) is not None or not wide.issuperset(
            self._dtypes.values()
        )
        self._grams: dict[frozenset[str], Tensor] = {}
        self._norms: dict[frozenset[str], Tensor] = {}
        self.expect_more = False
        self._enter_graph(first)

    def _enter_graph(self, forward: Forward) -> None:
        self.state = State.GRAPH
        self._forward: Forward | None = forward
        self._used = False
        self._kept: dict[str, Factor] = {}
        self._held: dict[str, Tensor] = {}
        self._joint: tuple[list[str], dict[str, Factor]] = [], {}
        self._versions: dict[str, int] | None = None

    def _enter_factors(self, kept: dict[str, Factor]) -> None:
        self.state = State.FACTORS
        self._forward, self._kept, self._held = None, kept, _held_rows(kept)
        self._joint, self._versions = ([], {}), versions(self._held)

    def release(self) -> None:
        """Free the graph and the factors; another pass can compute them again."""
        self.state, self._used = State.RELEASED, False
        self._forward, self._kept, self._held, self._versions = None, {}, {}, None
        self._joint = [], {}

    def empty(self) -> Tensor | None:
        """Find the rows with a NaN loss and a zero gradient, or None. (M,) bool."""
        lost, every = self._losses.isnan(), frozenset(self.shapes)
        if readable(lost) and not self.sharded.leaves:  # norms of shards are asked for on all ranks
            if not any(lost.tolist()):
                return None
            if self._absent is not None and torch.equal(lost, self._absent):
                return lost
            return lost & (self.sq_norms(every) == 0)
        if every in self._norms and not self.sharded.leaves:
            return lost & (self._norms[every] == 0)
        # The norms would cost one more backward pass than most chains need.
        return None if self._ignored is None else lost & self._ignored

    def gram(self, names: Collection[str]) -> Tensor:
        """Return the Gram over some leaves. (M, M)."""
        key = frozenset(names)
        if key not in self._grams:
            self._grams[key] = self._sum(
                names, lambda factor, _: factor.gram(), (self.count, self.count), join=True
            )
            # Signed terms that cancel can leave a small negative number for a row that is zero.
            self._grams[key].diagonal().clamp_(min=0)
            self._norms[key] = self._grams[key].diagonal()
            self.expect_more = False
        return self._grams[key]

    def sq_norms(self, names: Collection[str]) -> Tensor:
        """Return the squared norms over some leaves. (M,)."""
        key = frozenset(names)
        if key not in self._norms:
            self._norms[key] = self._sum(
                names, lambda factor, _: factor.sq_norms(), (self.count,), join=True
            )
            self.expect_more = not self._grams
        return self._norms[key]

    def dot(self, tree: Tree) -> Tensor:
        """Return the products with a tree of some leaves. (M,)."""
        return self._sum(tree, lambda factor, name: factor.dot(whole(tree[name])), (self.count,))

    def rows(self, names: Collection[str]) -> Tree:
        """Return the rows on some leaves."""
        found = self._ask(names, lambda factor, name: factor.rows().to(self._dtypes[name]))
        return {
            name: found[name]
            if name in found
            else torch.zeros(
                (self.count, *self.shapes[name]), dtype=self._dtypes[name], device=self.device
            )
            for name in names
        }

    def leaf_grams(self, names: Collection[str]) -> Tree:
        """Return the Gram of each of some leaves. (M, M) each."""
        found = self._ask(names, lambda factor, _: factor.gram())
        for gram in found.values():
            gram.diagonal().clamp_(min=0)  # as in `gram`
        dtype = _tree.sum_dtype(self._losses)
        nothing = torch.zeros((self.count, self.count), dtype=dtype, device=self.device)
        return {name: found.get(name, nothing) for name in names}

    def leaf_totals(self, weights: Tree) -> Tree:
        """Compute Σ_m w_m row_m with weights of its own for each leaf; weight 0 is masked."""
        # As in `total`: half precision holds the numbers of a mean.
        sizes = {name: w.abs().sum() for name, w in weights.items()}
        sizes = {
            name: torch.where((size > 0) & self._half, size, 1.0) for name, size in sizes.items()
        }
        shares = {name: w / sizes[name] for name, w in weights.items()}

        def total(factor: Factor, name: str) -> Tensor:
            return factor.total(shares[name], self._live((), shares[name]))

        found = self._ask(weights, total)
        for name in weights.keys() - found.keys():
            found[name] = torch.zeros(self.shapes[name], device=self.device)
        return {
            name: (_tree.at_least_float32(found[name]) * sizes[name].to(found[name].dtype))
            .to(self._dtypes[name])
            .view(self.shapes[name])
            for name in weights
        }

    def reduced(self, names: Collection[str], reduce: Callable[[Tensor], Tensor]) -> Tree:
        """Apply a function (M, *shape) -> (*shape) to the rows of each leaf, one leaf at a time."""
        found = self._ask(names, lambda factor, name: reduce(factor.rows().to(self._dtypes[name])))
        for name in names:
            if name not in found:
                zero = torch.zeros((), dtype=self._dtypes[name], device=self.device)
                found[name] = reduce(zero.expand(self.count, *self.shapes[name]))
        return {name: found[name] for name in names}

    def factors(self, names: Collection[str]) -> dict[str, Factor]:
        """Return the factors of some leaves; those without a gradient have none."""
        return {name: factor for name, factor in self._factors().items() if name in names}

    def total(self, names: Collection[str], weights: Tensor, finish: Finish | None = None) -> Tree:
        """Compute Σ_m w_m row_m on some leaves; rows of weight 0 are masked."""
        size = None
        if self._half:  # half precision holds the numbers of a mean; small weights would underflow
            size = weights.abs().sum()
            size = torch.where(size > 0, size, 1.0)
            weights = weights / size
        done = partial(self._finished, size, finish)
        found = self._total(names, weights, done)
        for name in names:
            if name not in found:
                nothing = torch.zeros(
                    self.shapes[name], dtype=self._dtypes[name], device=self.device
                )
                found[name] = nothing if finish is None else finish(name, nothing)
        return {name: found[name] for name in names}

    def _finished(
        self, size: Tensor | None, finish: Finish | None, name: str, total: Tensor
    ) -> Tensor:
        """Return the total of one leaf in the leaf's shape and dtype."""
        if size is not None:
            wide = _tree.at_least_float32(total)
            total = wide * size.to(wide.dtype)
        total = total.view(self.shapes[name])
        if finish is not None:
            total = finish(name, total)
        return total.to(self._dtypes[name])

    def sum_squares(
        self, names: Collection[str], weights: Tensor, finish: Finish | None = None
    ) -> Tree:
        """Compute Σ_m w_m row_m² on some leaves, in float32 or wider; weight 0 masks a row."""
        live = self._live(names, weights)
        found = self._ask(names, _SumOfSquares(weights, live, self.shapes, finish))
        for name in names:
            if name not in found:
                dtype = torch.promote_types(self._dtypes[name], torch.float32)
                nothing = torch.zeros(self.shapes[name], dtype=dtype, device=self.device)
                found[name] = nothing if finish is None else finish(name, nothing)
        return {name: found[name] for name in names}

    def each(self, names: Collection[str], question: Question) -> Tree:
        """Return the answers to a question about each of some leaves, also those without gradient.

        The order is that of the backward pass, the same on all ranks.
        """
        found = self._ask(names, question, in_pass=not self.sharded.leaves)
        for name in names:
            if name not in found:
                nothing = torch.zeros((), dtype=self._dtypes[name], device=self.device)
                rows = nothing.expand(self.count, *self.shapes[name])
                found[name] = question(DenseFactor(rows), name)
        return {name: found[name] for name in names}

    def _total(self, names: Collection[str], weights: Tensor, done: Finish) -> Tree:
        """Compute `total` for the leaves that have a gradient, each finished by ``done``."""
        # Losses in half precision would round the weights, so the rows are weighted instead.
        wide = self._losses.element_size() >= 4
        if (
            wide
            and self._linear
            and self.state is not State.FACTORS
            and set(names) == set(self.shapes)
        ):
            found = self._weighted(weights, done)
            if found is not None:
                return found
        total = _Total(weights, self._live(names, weights), done)
        found = self._ask(names, total, join=not self.sharded.leaves)
        if JOINED in found:
            parts = split_joined(found.pop(JOINED), self._joined(names)[0], self.shapes)
            found |= {name: done(name, part) for name, part in parts.items()}
        return found

    def _live(self, names: Collection[str], weights: Tensor) -> Tensor | None:
        """Find the rows not to mask; None if all rows of weight 0 are known to be finite."""
        live = harmless = weights != 0
        if frozenset(names) in self._norms:
            harmless = live | self._norms[frozenset(names)].isfinite()
        # Masking copies the factors.
        return None if readable(harmless) and all(harmless.tolist()) else live

    def _weighted(self, weights: Tensor, done: Finish) -> Tree | None:
        """Run one backward pass with weighted losses. Return None if it was refused."""
        # The finite norm of a dead row does not help: 0 times an infinite derivative is NaN.
        totals = _Totals(self._live((), weights), done)
        answered = self._backward(weights, totals, retain=self.expect_more)
        return totals.found if answered else None

    def _sum(
        self,
        names: Collection[str],
        question: Question,
        shape: tuple[int, ...],
        *,
        join: bool = False,
    ) -> Tensor:
        """Sum the answers to a question over some leaves."""
        answers = list(self._ask(names, question, join=join).values())
        dtype = _tree.sum_dtype(self._losses)
        if not answers:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.stack(answers).sum(0)

    def _ask(
        self,
        names: Collection[str],
        question: Question,
        *,
        join: bool = False,
        in_pass: bool = False,
    ) -> Tree:
        """Return the answers of the named leaves that have a gradient.

        Args:
            names: The leaves.
            question: The question. A leaf may be asked again, if a backward pass is refused.
            join: True to ask once for all leaves with small rows.
            in_pass: True to ask each leaf during the backward pass, also if factors are kept.
        """
        if not self.modes.keeps and self.state is not State.FACTORS:
            answers = _Answers(self, names, question)
            if self._backward(None, answers):
                return answers.found
        elif in_pass and self.state is not State.FACTORS:
            kept = _KeptAnswers(self, names=names, question=question)
            if self._backward(None, kept):
                self._enter_factors(kept.found)
                return kept.answers
        chosen = self.factors(names)
        if join:
            small, joint = self._joined(names)
            for name in small:
                del chosen[name]
            chosen |= joint
        with torch.set_grad_enabled(False), _tree.no_autocast(self._losses):
            return {name: question(factor, name) for name, factor in chosen.items()}

    def _joined(self, names: Collection[str]) -> tuple[list[str], dict[str, Factor]]:
        """Return those leaves whose rows are held and small, and the one factor of all of them.

        Gram and combination ask about the same leaves, so the last join is kept. The rows of each
        leaf become views of it, so that it takes no memory in addition.
        """
        small = small_rows(self._held, names)
        if small != self._joint[0]:
            joint, parts = join_rows(self._held, small)
            self._joint = small, joint
            self._kept |= {name: DenseFactor(part) for name, part in parts.items()}
            self._held |= parts
            self._versions = versions(self._held)
        return self._joint

    def _factors(self) -> dict[str, Factor]:
        """Return the factor of each leaf; run the backward pass first if they are not held."""
        if self.state is State.FACTORS and written(self._held, self._versions):
            self.release()  # `rows` returns what is held, and the user has written into it
        if self.state is not State.FACTORS:
            kept = _KeptFactors(self)
            if self._backward(None, kept):
                self._enter_factors(kept.found)
        return self._kept

    def as_factor(self, name: str, factors: list[Factor], grad: Tensor | None) -> Factor:
        """Return the one factor of a complete leaf, in the leaf's mode."""
        parts = join_uses(factors) if len(factors) > 1 else [*factors]
        if grad is not None:
            parts.append(DenseFactor(grad))
        if name in self._hooks:
            rows = parts[0].rows() if len(parts) == 1 else TiledFactor(parts).rows()
            rows, first = rows.to(self._dtypes[name]), parts[0]
            if len(parts) == 1 and isinstance(first, GroupedFactor):
                # A row that does not use a parameter has no gradient for its hooks.
                using = torch.cat(first.places)
                return DenseFactor(
                    rows.index_copy(0, using, apply_hooks(rows[using], self._hooks[name]))
                )
            return DenseFactor(apply_hooks(rows, self._hooks[name]))
        mode = self.modes.layers[name].mode
        if len(parts) == 1 and (mode == "ghost" or isinstance(parts[0], DenseFactor)):
            return parts[0]
        tiled = TiledFactor(parts)
        return DenseFactor(tiled.rows()) if mode == "store" else tiled

    def _backward(
        self, weights: Tensor | None, visitor: LeafVisitor, *, retain: bool = True
    ) -> bool:
        """Run one backward pass. Return False if it was refused: the source's rows are then held.

        The graph is retained only if ``retain`` is set and factors are not kept.
        """
        run, used = self._forward or self._source.rerun(), self._used
        retain = retain and not self.modes.keeps
        if retain:
            self._enter_graph(run)
            self._used = True
        else:  # the pass frees the activations while it runs
            self.release()
        losses = run.losses
        cotangent = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        try:
            # Autocast applies to the forward pass only; the answers are computed exactly.
            with _tree.no_autocast(losses), self._source.backward_pass(run):
                run.backward(cotangent, visitor, retain=retain)
        except Exception as refusal:
            note_anomaly(refusal)
            self.release()
            if used:  # a graph with selective checkpoints allows one backward pass only
                return self._backward(weights, visitor, retain=retain)
            rows = self._source.fallback(refusal)
            self.fallback = reason_of(refusal)
            self._enter_factors({name: DenseFactor(leaf) for name, leaf in rows.items()})
            return False
        return True


@dataclass(frozen=True, eq=False)
class _Total:
    """The question for Σ_m w_m row_m of a leaf, finished unless it is of several leaves joined."""

    weights: Tensor
    live: Tensor | None
    done: Finish

    def __call__(self, factor: Factor, name: str) -> Tensor:
        found = factor.total(self.weights, self.live)
        return found if name == JOINED else self.done(name, found)


@dataclass(frozen=True, eq=False)
class _SumOfSquares:
    """The question for Σ_m w_m row_m² of a leaf."""

    weights: Tensor
    live: Tensor | None
    shapes: Mapping[str, torch.Size]
    finish: Finish | None

    def __call__(self, factor: Factor, name: str) -> Tensor:
        found = factor.sum_squares(self.weights, self.live).view(self.shapes[name])
        return found if self.finish is None else self.finish(name, found)


@dataclass
class _Totals(LeafVisitor):
    """Sums the gradients of all rows, in a backward pass with weighted losses."""

    live: Tensor | None
    done: Finish
    found: Tree = field(default_factory=dict)

    @override
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        parts = [factor.total(None, self.live) for factor in factors]
        if grad is not None:
            parts.append(DenseFactor(grad).total(None, self.live))
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        self.found[name] = self.done(name, total)


@dataclass
class _Answers(LeafVisitor):
    """Answers a question about some leaves, and keeps no factor."""

    rows: LazyRows
    names: Collection[str]
    question: Question
    found: Tree = field(default_factory=dict)

    @override
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        if name in self.names:
            self.found[name] = self.question(self.rows.as_factor(name, factors, grad), name)


@dataclass
class _KeptFactors(LeafVisitor):
    """Keeps the factor of each leaf."""

    rows: LazyRows
    found: dict[str, Factor] = field(default_factory=dict)

    @override
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        self.found[name] = self.rows.as_factor(name, factors, grad)


@dataclass(kw_only=True)
class _KeptAnswers(_KeptFactors):
    """Keeps the factor of each leaf, and answers a question about some of them."""

    names: Collection[str]
    question: Question
    answers: Tree = field(default_factory=dict)

    @override
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        super().visit(name, factors, grad)
        if name in self.names:
            self.answers[name] = self.question(self.found[name], name)


def _held_rows(kept: dict[str, Factor]) -> dict[str, Tensor]:
    """Return the rows among the factors that are held."""
    return {name: factor.held for name, factor in kept.items() if isinstance(factor, DenseFactor)}


# --- The stack ---


LARGEST_GRAM = 2048
"""The number of rows above which a Gram is avoided if there is another way."""


@copied("losses", "scale")
@dataclass(frozen=True, eq=False, repr=False)
class FusedStack(ComputedStack):
    """The rows of a `LazyRows`, cut to some leaves and to the first rows, and scaled.

    Each question is answered in the cheapest way, and later questions reuse the work: the Gram and
    the combination that a filter asks for cost one backward pass and the products of the Gram.
    Only `stacked` computes the rows themselves.
    """

    run: LazyRows
    names: tuple[str, ...]
    count: int
    losses: Tensor
    buffers: Tree
    aux: Any
    origin: StackOrigin
    scale: Tensor | None = None

    @override
    def __len__(self) -> int:
        return self.count

    @property
    @override
    def _rows(self) -> int:
        return self.count

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return {name: self.run.shapes[name] for name in self.names}

    @property
    @override
    def device(self) -> torch.device:
        return self.run.device

    @override
    def _empty(self) -> Tensor | None:
        empty = untraced(self.run.empty)()
        return None if empty is None else empty[: self.count]

    @property
    def overrides(self) -> Mapping[str, int]:
        """The number of times each operation override ran for all rows at once, by name."""
        return dict(self.run.overrides)

    @property
    def layers(self) -> list[Layer]:
        """The treatment of each leaf's rows."""
        return [self.run.modes.layers[name] for name in self.names]

    @property
    def sharded(self) -> ShardedLeaves:
        """The parameters that are sharded over ranks; `across_ranks` makes of it rows of all."""
        return self.run.sharded

    def _check_whole(self) -> None:
        """Refuse an answer of the size of the parameters, of which each rank holds a shard."""
        if self.sharded.leaves:
            raise ValueError(
                "Expected across_ranks() before a sum of rows over sharded parameters: each rank "
                "holds its part of the sum, over the rows of all. Put "
                "gradfilter.distributed.across_ranks(group) in front of the chain; the group has "
                "the ranks with other samples, None for all."
            )

    def each(self, question: Question) -> Tree:
        """Ask about each leaf, also those without gradient, in one order on all ranks."""
        return untraced(self.run.each)(self.names, partial(self._asked, question))

    def _asked(self, question: Question, factor: Factor, name: str) -> Tensor:
        """Ask about the first rows of a factor, scaled as those of the stack."""
        if isinstance(factor, TiledFactor) and len(factor.parts) == 1:
            factor = factor.parts[0]
        if self.scale is not None or self.count < self.run.count:
            factor = first_scaled(factor, self.count, self.scale)
        return question(factor, name)

    @override
    def explain(self) -> str:
        """Return the mode, the extra flops and the kept bytes of every leaf, one line per leaf."""
        lines = [str(self.run.modes)]
        if self.run.checkpointed and not self.run.modes.keeps:
            lines.append(
                "the loss uses activation checkpoints; a larger memory_budget= holds what they "
                "would forget, and takes fewer passes"
            )
        if self.groups:
            rows = "; ".join(", ".join(map(str, group)) for group in self.groups)
            lines.append(
                f"{len(self.groups)} passes, for the loss asks rows what they differ in: {rows}"
            )
        if self.run.by_row:
            lines.append(f"row by row inside the pass: {', '.join(self.run.by_row)}")
        if self.run.moved:
            lines.append(f"values computed for every row: {', '.join(self.run.moved)}")
        return "\n".join([*lines, *explain_fallback(self.run.fallback)])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each pass, if rows that answer the host differently ran separately."""
        return self.run.groups

    @override
    def gram_is_cheap(self) -> bool:
        """Compare the flops of both ways; False if M x M numbers are too many."""
        return self.run.modes.gram_is_cheap and self.run.count <= LARGEST_GRAM

    @override
    def release(self) -> None:
        """Free the graph and the factors of the pass."""
        self.run.release()

    @override
    def gram(self) -> Tensor:
        gram, scale = untraced(self.run.gram)(self.names)[: self.count, : self.count], self.scale
        # `LazyRows` caches its Gram, so every caller gets a copy of these few numbers.
        return gram.clone() if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    @override
    def sq_norms(self) -> Tensor:
        norms, scale = untraced(self.run.sq_norms)(self.names)[: self.count], self.scale
        return norms.clone() if scale is None else scale_rows(scale_rows(norms, scale), scale)

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(untraced(self.run.dot)(dict(tree))[: self.count], self.scale)

    @override
    def combine(self, weights: Tensor) -> Tree:
        self._check_whole()
        return self.combine_into(weights, None)

    def combine_into(self, weights: Tensor, finish: Finish | None) -> Tree:
        """Compute `combine`; ``finish`` gets the sum of each leaf as soon as it is there."""
        check_per_row("weight", weights, self.count)
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        if self.count < self.run.count:
            weights = torch.cat([weights, weights.new_zeros(self.run.count - self.count)])
        return untraced(self.run.total)(self.names, weights, finish)

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        self._check_whole()
        return self.sum_squares_into(weights, None)

    def sum_squares_into(self, weights: Tensor, finish: Finish | None) -> Tree:
        """Compute `sum_squares`; ``finish`` gets the sum of each leaf as soon as it is there."""
        check_per_row("weight", weights, self.count)
        weights = scale_rows(scale_rows(_tree.at_least_float32(weights), self.scale), self.scale)
        weights = torch.cat([weights, weights.new_zeros(self.run.count - self.count)])
        return untraced(self.run.sum_squares)(self.names, weights, finish)

    @override
    def stacked(self) -> Tree:
        rows = untraced(self.run.rows)(self.names)
        return {n: scale_rows(leaf[: self.count], self.scale) for n, leaf in rows.items()}

    @override
    def leaf_grams(self) -> Tree:
        grams, count, scale = untraced(self.run.leaf_grams)(self.names), self.count, self.scale
        return {
            name: scale_rows(scale_rows(gram[:count, :count], scale).T, scale).T
            for name, gram in grams.items()
        }

    @override
    def combine_leaves(self, weights: Mapping[str, Tensor]) -> Tree:
        self._check_whole()
        given = {}
        for name in self.names:
            check_per_row("weight", weights[name], self.count)
            own = scale_rows(_tree.at_least_float32(weights[name]), self.scale)
            rest = own.new_zeros(self.run.count - self.count)
            given[name] = torch.cat([own, rest]) if self.count < self.run.count else own
        return untraced(self.run.leaf_totals)(given)

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        self._check_whole()
        return untraced(self.run.reduced)(self.names, partial(self._reduce, function))

    def _reduce(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return reduce_pieces(function, rows[: self.count], self.scale)

    @override
    def along(self, factors: Tensor) -> GradStack:
        check_per_row("factor", factors, self.count)
        # Groups of rows and a single row use the parameters themselves.
        single = self.run.count == 1 and not self.sharded.leaves
        if self.origin.per_row or self.groups or single:
            return super().along(factors)
        return untraced(self._along)(factors)

    @override
    def at_rows(self, params: Tree) -> GradStack:
        self._check_shared("at_rows")
        return super().at_rows(params)

    @override
    def _points(self, factors: Tensor) -> Tree:
        self._check_shared("along")
        return super()._points(factors)

    def _check_shared(self, question: str) -> None:
        """Refuse parameters of each row, of which no rank holds a shard."""
        if self.sharded.leaves:
            raise ValueError(
                f"Expected parameters that all rows share, because they are sharded over ranks "
                f"(DTensor), found the question {question!r} for parameters of each row. Use "
                "sam_perturb(rho, per_microbatch=True) without adaptive=, or one perturbation for "
                "all rows."
            )

    def _along(self, factors: Tensor) -> GradStack:
        steps = scale_rows(_tree.at_least_float32(factors), self.scale).clone()
        # Rows that `first` cut off stay where they are.
        steps = torch.cat([steps, steps.new_zeros(self.run.count - self.count)])
        self.origin.check(self.origin.params.keys())
        moves = {n: Move(factor, steps) for n, factor in self.run.factors(self.names).items()}
        params = ParamsAlong(self.origin.params, moves, self.run.count)
        return self.like(self.origin.evaluate(params, True, self.origin.params.keys()))

    @override
    def _scaled(self, scale: Tensor) -> FusedStack:
        return replace(self, scale=scale)

    @override
    def _columns(self, names: Collection[str]) -> FusedStack:
        return replace(self, names=tuple(name for name in self.names if name in names))

    @override
    def _first(self, count: int) -> FusedStack:
        losses, aux, scale = first_rows((self.losses, self.aux, self.scale), count)
        return replace(self, count=count, losses=losses, aux=aux, scale=scale)
