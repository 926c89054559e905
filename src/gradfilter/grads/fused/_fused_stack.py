"""The stack of the fused plan: a lazy backward pass whose factors answer every question."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._readable import readable
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._call_context import random_state, set_random_state
from gradfilter.grads._error_notes import note_anomaly, reason_of
from gradfilter.grads._loop import Rows
from gradfilter.grads._module_tensors import Hook, hooked
from gradfilter.grads._stack import (
    ComputedStack,
    StackOrigin,
    check_per_row,
    check_same_leaves,
    copied,
    explain_fallback,
    first_rows,
    scale_rows,
    versions,
    written,
)
from gradfilter.grads.fused._factors import (
    JOINED,
    DenseFactor,
    Factor,
    TiledFactor,
    join_dense,
    small_dense,
    split_joined,
)
from gradfilter.grads.fused._forward import Forward
from gradfilter.grads.fused._lift import autocast_dtype, untraced
from gradfilter.grads.fused._row_groups import GroupedFactor
from gradfilter.grads.fused._tape import Layer, Modes, choose_modes

# --- The rows of one pass, computed on demand ---


Question = Callable[[Factor, str], Tensor]


class LazyRows:
    """The rows of one forward pass, computed when they are asked for.

    The first question runs the backward pass, which leaves a factor for every leaf; all further
    ones are answered from those. A combination that is asked first of all is one ordinary backward
    pass with weighted losses. Who has asked enough lets go; whoever asks again pays for a new pass.

    Args:
        again: Runs the forward pass once more, on the same random numbers.
        first: The forward pass that was run already.
        budget: Bytes that may be held between questions.
        instead: Gives the rows in another way where the backward pass is refused, or raises.
        hooks: What the user registered on parameters, to be run on every row.
    """

    def __init__(
        self,
        again: Callable[[], Forward],
        first: Forward,
        budget: int,
        instead: Callable[[Exception], Tree] | None = None,
        hooks: dict[str, list[Hook]] | None = None,
    ) -> None:
        self._again, self._instead = again, instead
        self.fallback = ""  # why the loop has computed the rows, once it has
        # Those of a single row are on its leaves.
        self._hooks = (hooks or {}) if first.tape.alone is None else {}
        self._linear = first.tape.linear
        self._forward: Forward | None = first
        self.shapes = {name: leaf.shape[1:] for name, leaf in first.tape.leaves.items()}
        self._dtypes = {name: leaf.dtype for name, leaf in first.tape.leaves.items()}
        self.modes: Modes = choose_modes(first.tape.leaves, first.tape.uses, budget)
        self.overrides = dict(first.tape.overrides)
        self.groups, self.by_row = first.groups, first.by_row
        self.count = len(first.losses)
        self._losses = first.losses.detach()
        self.device = first.losses.device
        self._ignored = first.tape.ignored
        self._half = autocast_dtype(self.device) is not None or any(
            dtype.itemsize < 4 for dtype in self._dtypes.values()
        )
        self._kept: dict[str, Factor] | None = None
        self._versions: dict[str, int] | None = None
        self._grams: dict[frozenset[str], Tensor] = {}
        self._norms: dict[frozenset[str], Tensor] = {}

    def release(self) -> None:
        """Let go of the graph and of everything that another pass can bring back."""
        self._forward = None
        self._kept = None

    def empty(self) -> Tensor | None:
        """Which rows have a NaN loss and gradient zero; None where none has. (M,) bool."""
        lost, every = self._losses.isnan(), frozenset(self.shapes)
        if readable(lost):
            if not any(lost.tolist()):
                return None
            return lost & (self.sq_norms(every) == 0)
        if every in self._norms:
            return lost & (self._norms[every] == 0)
        # Norms would cost a backward pass more than most chains take.
        return None if self._ignored is None else lost & self._ignored

    def gram(self, names: Collection[str]) -> Tensor:
        """The Gram over some leaves. (M, M)."""
        key = frozenset(names)
        if key not in self._grams:
            self._grams[key] = self._sum(
                names, lambda factor, _: factor.gram(), (self.count, self.count), join=True
            )
            # Signed terms that cancel leave a little less than nothing of a row that is zero.
            self._grams[key].diagonal().clamp_(min=0)
            self._norms[key] = self._grams[key].diagonal()
        return self._grams[key]

    def sq_norms(self, names: Collection[str]) -> Tensor:
        """Squared norms over some leaves. (M,)."""
        key = frozenset(names)
        if key not in self._norms:
            self._norms[key] = self._sum(
                names, lambda factor, _: factor.sq_norms(), (self.count,), join=True
            )
        return self._norms[key]

    def dot(self, tree: Tree) -> Tensor:
        """Products with a tree of some leaves. (M,)."""
        return self._sum(tree, lambda factor, name: factor.dot(tree[name]), (self.count,))

    def rows(self, names: Collection[str]) -> Tree:
        """The rows on some leaves."""
        found = self._ask(names, lambda factor, name: factor.rows().to(self._dtypes[name]))
        return {
            name: found[name]
            if name in found
            else torch.zeros(
                (self.count, *self.shapes[name]), dtype=self._dtypes[name], device=self.device
            )
            for name in names
        }

    def total(self, names: Collection[str], weights: Tensor) -> Tree:
        """Σ_m w_m row_m on some leaves, nothing of a row of weight 0."""
        if self._half:  # which holds the numbers of a mean: smaller weights would underflow
            size = weights.abs().sum()
            size = torch.where(size > 0, size, 1.0)
            total = self._total(names, weights / size)
            wide = {name: _tree.at_least_float32(leaf) for name, leaf in total.items()}
            found = {name: leaf * size.to(leaf.dtype) for name, leaf in wide.items()}
        else:
            found = self._total(names, weights)
        return {
            name: found[name].to(self._dtypes[name]).view(self.shapes[name])
            if name in found
            else torch.zeros(self.shapes[name], dtype=self._dtypes[name], device=self.device)
            for name in names
        }

    def _total(self, names: Collection[str], weights: Tensor) -> Tree:
        """The same of the leaves that have a gradient, as it was computed."""
        # Of losses in half precision, which would round the weights, the rows are weighed.
        wide = self._losses.element_size() >= 4
        found = None
        if wide and self._linear and self._kept is None and set(names) == set(self.shapes):
            found = self._weighted(weights)
        if found is None:
            live = self._live(names, weights)
            found = self._ask(names, lambda factor, _: factor.total(weights, live), join=True)
            if JOINED in found:
                small = small_dense(self._factors(), names)
                found |= split_joined(found.pop(JOINED), small, self.shapes)
        return found

    def _live(self, names: Collection[str], weights: Tensor) -> Tensor | None:
        """Which rows to mask: None where no row of weight 0 has a non-finite number in it."""
        live = harmless = weights != 0
        if frozenset(names) in self._norms:
            harmless = live | self._norms[frozenset(names)].isfinite()
        # Masking copies all that was kept.
        return None if readable(harmless) and all(harmless.tolist()) else live

    def _weighted(self, weights: Tensor) -> Tree | None:
        """One backward pass with the losses weighted, or None where that was refused."""
        found: Tree = {}
        # Where a row is dead, its finite norm says nothing: 0 times an infinite derivative is NaN.
        live = self._live((), weights)

        def visit(name: str, factors: list[Factor], grad: Tensor | None) -> None:
            parts = [factor.total(None, live) for factor in factors]
            if grad is not None:
                parts.append(DenseFactor(grad).total(None, live))
            found[name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        # A combination that comes first, or behind a Gram, is the last question of most filters:
        # the pass frees activations as it goes, as any other does. Norms announce a few more.
        done = self._backward(weights, visit, last=bool(self._grams) or not self._norms)
        return found if done else None

    def _sum(
        self,
        names: Collection[str],
        question: Question,
        shape: tuple[int, ...],
        *,
        join: bool = False,
    ) -> Tensor:
        """The sum of a question's answers over some leaves."""
        answers = list(self._ask(names, question, join=join).values())
        dtype = _tree.wide(torch.empty(0, device=self.device))
        if not answers:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.stack(answers).sum(0)

    def _ask(self, names: Collection[str], question: Question, *, join: bool = False) -> Tree:
        """The answers of all leaves that have a gradient."""
        if not self.modes.keeps and self._kept is None:
            found: Tree = {}

            def visit(name: str, factors: list[Factor], grad: Tensor | None) -> None:
                if name in names:
                    found[name] = question(self._as_factor(name, factors, grad), name)

            if self._backward(None, visit):
                return found
        factors = self._factors()
        chosen = {name: factors[name] for name in factors if name in names}
        if join:
            small = small_dense(factors, names)
            rest = {name: factor for name, factor in chosen.items() if name not in set(small)}
            chosen = {**rest, **join_dense(chosen, small)}
        with torch.no_grad(), self._no_autocast():
            return {name: question(factor, name) for name, factor in chosen.items()}

    def _factors(self) -> dict[str, Factor]:
        """What the backward pass left of each leaf, after running it if need be."""
        if self._kept is not None and written(_held(self._kept), self._versions):
            self._kept = None  # `rows` gives what is held, and somebody has written to it
        if self._kept is None:
            kept: dict[str, Factor] = {}

            def visit(name: str, factors: list[Factor], grad: Tensor | None) -> None:
                kept[name] = self._as_factor(name, factors, grad)

            if self._backward(None, visit):
                self._kept = kept
            assert self._kept is not None  # a refused pass leaves the rows of another
            self._versions = versions(_held(self._kept))
        return self._kept

    def _as_factor(self, name: str, factors: list[Factor], grad: Tensor | None) -> Factor:
        """The one factor of a complete leaf, in the leaf's mode."""
        parts = [*factors] if grad is None else [*factors, DenseFactor(grad)]
        if name in self._hooks:
            rows = parts[0].rows() if len(parts) == 1 else TiledFactor(parts).rows()
            rows, first = rows.to(self._dtypes[name]), parts[0]
            if len(parts) == 1 and isinstance(first, GroupedFactor):
                # Where a row does not use a parameter, there is no gradient to hook on.
                using = torch.cat(first.places)
                return DenseFactor(
                    rows.index_copy(0, using, hooked(rows[using], self._hooks[name]))
                )
            return DenseFactor(hooked(rows, self._hooks[name]))
        mode = self.modes.layers[name].mode
        if len(parts) == 1 and (mode == "ghost" or isinstance(parts[0], DenseFactor)):
            return parts[0]
        tiled = TiledFactor(parts)
        return DenseFactor(tiled.rows()) if mode == "store" else tiled

    def _backward(
        self, weights: Tensor | None, visit: Callable[..., None], *, last: bool = False
    ) -> bool:
        """Run one backward pass; False where it was refused, and the rows are kept instead."""
        run = self._forward or self._again()
        # With nothing kept the next question needs the graph again.
        retain = not self.modes.keeps and not last
        self._forward = run if retain else None
        losses = run.losses
        cotangent = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        try:
            # Autocast has done its work in the forward pass; what is asked, is asked exactly.
            with self._no_autocast():
                run.run_backward(lambda: run.tape.backward(losses, cotangent, visit, retain=retain))
        except Exception as refusal:
            note_anomaly(refusal)
            if self._instead is None:
                raise
            self._forward = None
            rows = self._instead(refusal)
            self.fallback = reason_of(refusal)
            self._kept = {name: DenseFactor(leaf) for name, leaf in rows.items()}
            self._versions = versions(_held(self._kept))
            return False
        return True

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)


def _held(kept: dict[str, Factor]) -> dict[str, Tensor]:
    """The rows among what is kept."""
    return {name: factor.held for name, factor in kept.items() if isinstance(factor, DenseFactor)}


# --- The stack ---


LARGEST_GRAM = 2048
"""Rows from which a Gram is too large to be made where something else will do."""


@copied("losses", "scale")
@dataclass(frozen=True, eq=False, repr=False)
class FusedStack(ComputedStack):
    """The rows of a `Pass`, cut to some leaves and to the first ones, and scaled.

    Each question is answered by the cheapest way there is, and what it took is shared with the
    next: the Gram and the combination that a filter asks for cost one backward pass and the
    products of the Gram; the rows themselves are made by `stacked` alone.
    """

    run: LazyRows
    names: tuple[str, ...]
    count: int
    losses: Tensor
    buffers: Tree
    aux: Any
    origin: StackOrigin
    scale: Tensor | None = None

    def __len__(self) -> int:
        """M."""
        return self.count

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return {name: self.run.shapes[name] for name in self.names}

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.run.device

    def _empty(self) -> Tensor | None:
        """Rows with a NaN loss and gradient zero. (M,) bool."""
        empty = untraced(self.run.empty)()
        return None if empty is None else empty[: self.count]

    @property
    def overrides(self) -> Mapping[str, int]:
        """How often each rule ran for all rows at once, by its name."""
        return dict(self.run.overrides)

    @property
    def layers(self) -> list[Layer]:
        """How each leaf's rows are treated."""
        return [self.run.modes.layers[name] for name in self.names]

    def explain(self) -> str:
        """Return the mode, the extra flops and the kept bytes of every leaf, one line per leaf."""
        lines = [str(self.run.modes)]
        if self.groups:
            rows = "; ".join(", ".join(map(str, group)) for group in self.groups)
            lines.append(
                f"{len(self.groups)} passes, for the loss asks rows what they differ in: {rows}"
            )
        if self.run.by_row:
            lines.append(f"row by row inside the pass: {', '.join(self.run.by_row)}")
        return "\n".join([*lines, *explain_fallback(self.run.fallback)])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each pass, where rows that answer the host differently have their own."""
        return self.run.groups

    def gram_is_cheap(self) -> bool:
        """By the flops of both ways, as long as M x M numbers are few."""
        return self.run.modes.gram_is_cheap and self.run.count <= LARGEST_GRAM

    def release(self) -> None:
        """Let go of the pass."""
        self.run.release()

    def gram(self) -> Tensor:
        """K = J Jᵀ. (M, M)."""
        gram, scale = untraced(self.run.gram)(self.names)[: self.count, : self.count], self.scale
        # The pass keeps its Gram: of few numbers everybody gets a copy.
        return gram.clone() if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M,)."""
        norms, scale = untraced(self.run.sq_norms)(self.names)[: self.count], self.scale
        return norms.clone() if scale is None else scale_rows(scale_rows(norms, scale), scale)

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(untraced(self.run.dot)(dict(tree))[: self.count], self.scale)

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, with rows of weight 0 masked."""
        check_per_row("weight", weights, self.count)
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        if self.count < self.run.count:
            weights = torch.cat([weights, weights.new_zeros(self.run.count - self.count)])
        return untraced(self.run.total)(self.names, weights)

    def stacked(self) -> Tree:
        """The rows, leaf by leaf."""
        rows = untraced(self.run.rows)(self.names)
        return {n: scale_rows(leaf[: self.count], self.scale) for n, leaf in rows.items()}

    def _scaled(self, scale: Tensor) -> FusedStack:
        return replace(self, scale=scale)

    def _columns(self, names: Collection[str]) -> FusedStack:
        return replace(self, names=tuple(name for name in self.names if name in names))

    def _first(self, count: int) -> FusedStack:
        losses, aux, scale = first_rows((self.losses, self.aux, self.scale), count)
        return replace(self, count=count, losses=losses, aux=aux, scale=scale)


# --- Rows at parameters of their own, some at a time: M sets of parameters need much memory ---


def chunked_rows(
    run: Callable[[Batch, Params], Forward], batch: Batch, params: Params, size: int
) -> Rows | None:
    """Rows (M, *shape), ``size`` of them at a time, or None where the loss draws random numbers.

    Those are drawn for all rows together, so that a chunk alone would draw others.
    """
    device = _tree.device_of(params)
    before = random_state(device)
    found: list[Rows] = []
    buffers: Tree = batch.buffers
    for low in range(0, len(batch), size):
        rows = slice(low, low + size)
        tensors = [t[rows] for t in batch.tensors]
        part = run(
            replace(batch, tensors=tensors, buffers=buffers),
            {name: p[rows] for name, p in params.items()},
        )
        after = random_state(device)
        if any(not torch.equal(after[kind], before[kind]) for kind in before):
            set_random_state(before, device)
            return None
        buffers = part.buffers
        found.append((_rows_of(part, params), part.losses.detach(), buffers, part.aux))
    grads, losses, _, aux = zip(*found, strict=True)
    joined = None if aux[0] is None else _tree.tree_map(lambda *t: torch.cat(t), *aux)
    return _tree.tree_map(lambda *t: torch.cat(t), *grads), torch.cat(losses), buffers, joined


def _rows_of(part: Forward, params: Params) -> Tree:
    return LazyRows(lambda: part, part, budget=0).rows(list(params))
