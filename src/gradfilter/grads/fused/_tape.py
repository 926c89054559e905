"""The leaves of a fused pass, the factors of their gradients, and the mode of each leaf."""

from __future__ import annotations

import copy
import math
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter._types import Tree
from gradfilter.grads.fused import _factors
from gradfilter.grads.fused._along import Move
from gradfilter.grads.fused._factors import Factor, ghost_flops
from gradfilter.grads.fused._sharded_leaves import ShardedLeaf, ShardedLeaves

# --- The tape ---


class LeafVisitor(ABC):
    """Gets the gradient of each leaf during a backward pass, as soon as the leaf is complete."""

    @abstractmethod
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        """Take the gradient of one leaf.

        Args:
            name: The leaf's name.
            factors: The factors that overrides recorded.
            grad: The gradient from autograd in addition to them, (M, *shape), or None.
        """


@dataclass(frozen=True)
class Weight:
    """A parameter as an operation override sees it.

    Attributes:
        source: The value that all rows share, without a leading axis; of a sharded parameter, the
            way to gather it.
        rows: The tensor (M, *shape) where autograd expects the gradient; None if frozen.
        leaf: The name of the leaf; None if the value was computed from leaves, or is frozen.
        move: What every row adds to the value; None if the rows share it.
    """

    source: Tensor | ShardedLeaf
    rows: Tensor | None
    leaf: str | None
    move: Move | None = None

    @property
    def value(self) -> Tensor:
        """The value; of a sharded parameter, gathered now. It must not be kept."""
        return self.source if isinstance(self.source, Tensor) else self.source.gathered()

    @property
    def shape(self) -> torch.Size:
        """The shape of the value, which sends nothing."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the value, which sends nothing."""
        return self.source.dtype

    def to(self, dtype: torch.dtype) -> Weight:
        """Return the same parameter with values of another dtype."""
        return replace(self, source=self.source.to(dtype))


class ProductSize(NamedTuple):
    """The sizes of an `OuterFactor`: (M, n, p) output gradients and (M, n, d) inputs."""

    rows: int
    n: int
    p: int
    d: int

    @property
    def ghost_flops(self) -> int | None:
        """The flops of the ghost Gram; None if rows are cheaper."""
        return ghost_flops(*self)


class Use(NamedTuple):
    """One use of a leaf by an override in the forward pass; the mode is chosen from it.

    Attributes:
        leaf: The leaf's name.
        override: The override's name.
        flops: The flops of the leaf's ordinary weight gradient over all rows.
        kept: The bytes of the factor, inputs and output gradients; 0 if the rows cost nothing.
        ghost_flops: The flops of the ghost Gram; None if there is none or rows are cheaper.
        product: The size of the use if its factor is an `OuterFactor`.
    """

    leaf: str
    override: str
    flops: int
    kept: int = 0
    ghost_flops: int | None = None
    product: ProductSize | None = None


@dataclass
class Tape:
    """The leaves of one forward pass, (M, *shape) each, which collects their gradients.

    A leaf is complete when the backward pass has finished every use of it. Then the visitor of
    that pass gets its gradient.

    Attributes:
        leaves: The leaves, (M, *shape) each.
        alone: For a single row, the leaves as the loss used them, without a leading axis.
        visitor: The visitor of the present backward pass.
        uses: The uses of leaves that overrides recorded.
        overrides: The number of times each override ran.
        looped: The operations that ran row by row.
        ignored: The rows that had only ignored labels in every class loss; None if not recorded,
            because the losses can be read. (M,) bool.
        linear: True if the backward pass is linear in the cotangent: no hook changes it.
        closed: True if the graph is known to end in the leaves alone, so that a backward pass
            writes into no tensor of the user.
        sharded: The sharded parameters among the leaves.
    """

    leaves: Tree
    alone: Tree | None = None
    visitor: LeafVisitor | None = None
    uses: list[Use] = field(default_factory=list)
    overrides: Counter[str] = field(default_factory=Counter)
    looped: set[str] = field(default_factory=set)
    ignored: Tensor | None = None
    linear: bool = True
    closed: bool = False
    sharded: ShardedLeaves = field(default_factory=ShardedLeaves)
    _factors: dict[str, list[Factor]] = field(default_factory=dict)
    _expected: Counter[str] = field(default_factory=Counter)
    _by_autograd: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Register hooks that finish every leaf as soon as it is complete."""
        # The leaf holds its hook, and the tape holds the leaf. The garbage collector may not find a
        # cycle through a tensor's hooks, which would keep the parameters of every step.
        weak: weakref.ref[Tape] = weakref.ref(self)
        for name, leaf in (self.alone or self.leaves).items():
            on_completion: Callable[..., Any] = leaf.register_post_accumulate_grad_hook
            on_completion(partial(_complete, weak, name))

    def _finish(self, name: str, grad: Tensor | None) -> None:
        factors = self._factors.pop(name, [])
        if name in self.sharded.leaves:
            self.sharded.leaves[name].release()
        if self.visitor is not None and (factors or grad is not None):
            self.visitor.visit(name, factors, grad)

    def expect(self, weight: Weight | None) -> None:
        """Note that a use of a sharded leaf will be recorded in the backward pass."""
        if weight is not None and weight.leaf is not None and weight.leaf in self.sharded.leaves:
            self._expected[weight.leaf] += 1
            self.sharded.used(weight.leaf)

    def expect_grad(self, leaf: str) -> None:
        """Note that a leaf also gets a gradient by autograd, after which it is complete."""
        self._by_autograd.add(leaf)
        if leaf in self.sharded.leaves:
            self.sharded.used(leaf)

    def record(self, weight: Weight, factor: Factor) -> Tensor | None:
        """Record the gradient of a weight, and return the gradient that autograd gets."""
        if weight.leaf is None:
            return factor.rows()
        found = self._factors.setdefault(weight.leaf, [])
        found.append(factor)
        expected = self._expected.get(weight.leaf)
        if len(found) == expected and weight.leaf not in self._by_autograd:
            self._finish(weight.leaf, None)  # torch runs no hook of a leaf without a gradient
        return None

    def apart(self) -> Tape:
        """Return a tape of the same leaves that records nothing on this one."""
        found = copy.copy(self)  # without hooks on the leaves
        found.visitor, found.ignored = None, None
        found.uses, found.overrides, found.looped = [], Counter(), set()
        found._factors, found._expected, found._by_autograd = {}, Counter(), set()
        return found

    def backward(
        self, losses: Tensor, cotangent: Tensor, visitor: LeafVisitor, *, retain: bool
    ) -> None:
        """Run one backward pass, and hand every leaf that has a gradient to the visitor."""
        self.visitor = visitor
        try:
            # torch goes through the whole graph to find the ways to given inputs.
            inputs = None if self.closed else list((self.alone or self.leaves).values())
            torch.autograd.backward(losses, cotangent, retain_graph=retain, inputs=inputs)
            for name in list(self._factors):
                self._finish(name, None)
        finally:
            self.visitor = None
            self._factors.clear()
            if self.sharded.leaves:
                self.sharded.release()


def _complete(weak: weakref.ref[Tape], name: str, leaf: Tensor) -> None:
    """Finish a leaf: a hook on it, which runs when its gradient is accumulated."""
    tape = weak()
    grad, leaf.grad = leaf.grad, None
    if tape is None:
        return
    if grad is not None and tape.alone is not None:
        grad = (grad.to_dense() if grad.is_sparse else grad).unsqueeze(0)
    tape._finish(name, grad)


# --- Modes: a leaf is stored, streamed, or never materialised (ghost) ---


Mode = Literal["store", "stream", "ghost"]


@dataclass(frozen=True)
class Layer:
    """A leaf and the mode in which its rows are computed.

    Attributes:
        leaf: The leaf's name.
        shape: The leaf's shape.
        overrides: The overrides that used it, in order; none if only autograd did.
        mode: ``"store"``: the M rows are held, for Gram and combination. ``"stream"``: rows are
            computed for the Gram, some units at a time, and discarded; combinations come from
            inputs and output gradients. ``"ghost"``: the Gram also comes from those.
        flops: The flops in addition to a backward pass, for the Gram and for combining.
        bytes: The bytes held until the stack is released.
    """

    leaf: str
    shape: tuple[int, ...]
    overrides: tuple[str, ...]
    mode: Mode
    flops: int
    bytes: int


@dataclass(frozen=True)
class Modes:
    """The modes of all leaves.

    Attributes:
        layers: The mode of each leaf, by name.
        gram_is_cheap: True if the Gram takes fewer flops than combining once and one `dot`.
        keeps: True if factors and rows are kept between questions. False if they exceed the budget:
            then every question takes a backward pass of its own over the graph.
    """

    layers: Mapping[str, Layer]
    gram_is_cheap: bool
    keeps: bool

    @property
    def bytes(self) -> int:
        """The bytes that all leaves hold together."""
        return sum(layer.bytes for layer in self.layers.values()) if self.keeps else 0

    @override
    def __str__(self) -> str:
        """Return a table with one line per leaf."""
        kept = f"{self.bytes / 1e6:.1f} MB kept between questions"
        how = kept if self.keeps else "nothing kept: a backward pass per question"
        lines = [("leaf", "shape", "overrides", "mode", "Mflop", "kB")]
        for layer in self.layers.values():
            shape = "x".join(map(str, layer.shape)) or "()"
            overrides = ", ".join(dict.fromkeys(layer.overrides)) or "autograd"
            sizes = f"{layer.flops / 1e6:.1f}", f"{layer.bytes / 1e3:.0f}"
            lines.append((layer.leaf, shape, overrides, layer.mode, *sizes))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = [
            "  ".join(
                cell.rjust(w) if i > 3 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        total = sum(layer.flops for layer in self.layers.values())
        table.append(
            f"{len(self.layers)} leaves, {total / 1e6:.1f} Mflop beyond one backward pass, {how}"
        )
        return "\n".join(table)


MUCH_LARGER = 8
"""How many times the memory of their factors rows may take, unless a budget was given.

Rows that are held save one weight gradient of their layer. The layers of ResNet18 with 128 channels
exceed this limit with 32 rows of 4 images, and do not with 16 of 8 or 8 of 16.
"""


def choose_modes(leaves: Tree, uses: list[Use], budget: int, *, limit: float = math.inf) -> Modes:
    """Choose the fastest modes, and for leaves beyond the budget those that hold least.

    Args:
        leaves: The leaves, (M, *shape) each.
        uses: The uses of leaves by overrides.
        budget: The bytes that may be held.
        limit: How many times the memory of their factors rows may take that are held.
    """
    sizes = [(name, leaf.shape, leaf.element_size()) for name, leaf in leaves.items()]
    key = (tuple(sizes), tuple(uses), budget, limit, _factors.LARGE_SUM)
    try:
        hash(key)
    except TypeError:  # sizes that are symbols of a trace
        return _modes_for.__wrapped__(*key)
    return _modes_for(*key)


LeafSize = tuple[str, torch.Size, int]
"""A leaf's name, its shape (M, ...), and the bytes of one of its numbers."""


@lru_cache(maxsize=256)
def _modes_for(
    leaves: tuple[LeafSize, ...],
    uses: tuple[Use, ...],
    budget: int,
    limit: float,
    large_sum: float,
) -> Modes:
    """Choose the modes once for steps of equal sizes: they depend on nothing else.

    Args:
        leaves: The sizes of all leaves.
        uses: The uses of leaves by overrides.
        budget: The bytes that may be held.
        limit: See `choose_modes`.
        large_sum: `_factors.LARGE_SUM`, from which `ghost_flops` decides.
    """
    shapes = {name: shape for name, shape, _ in leaves}
    by_leaf: dict[str, list[Use]] = {name: [] for name in shapes}
    for use in uses:
        by_leaf[use.leaf].append(use)
    layers = {
        name: _fastest(name, shape, by_leaf[name], size, limit) for name, shape, size in leaves
    }
    excess = sum(layer.bytes for layer in layers.values()) - budget
    if excess > 0:
        excess = _save(layers, leaves, by_leaf, excess)
    gram = sum(layer.flops for layer in layers.values())
    products = sum(max(2 * use.flops, 4 * math.prod(shapes[use.leaf])) for use in uses)
    return Modes(layers, gram <= products, keeps=excess <= 0)


def _save(
    layers: dict[str, Layer],
    leaves: tuple[LeafSize, ...],
    by_leaf: dict[str, list[Use]],
    excess: int,
) -> int:
    """Choose modes that hold less until the budget suffices. Return the bytes still missing."""
    leaner = {
        name: _layer(name, shape, by_leaf[name], size, "stream")
        for name, shape, size in leaves
        if layers[name].mode == "store" and by_leaf[name] and all(use.kept for use in by_leaf[name])
    }
    savings = {name: layers[name].bytes - layer.bytes for name, layer in leaner.items()}
    for name in sorted(savings, key=lambda name: -savings[name]):
        if excess > 0 and savings[name] > 0:
            layers[name] = leaner[name]
            excess -= savings[name]
    if excess > 0:  # nothing is kept, so streaming costs no more memory than a tile
        layers |= leaner
    return excess


def _fastest(name: str, rows: tuple[int, ...], uses: list[Use], size: int, limit: float) -> Layer:
    if _ghost_flops(uses) is not None:
        return _layer(name, rows, uses, size, "ghost")
    store = _layer(name, rows, uses, size, "store")
    if not uses or not all(use.kept for use in uses):
        return store
    # Combining lookups takes fewer flops than combining rows, most of whose entries are 0.
    stream = _layer(name, rows, uses, size, "stream")
    heavy = store.bytes > limit * stream.bytes
    return stream if heavy or stream.flops < store.flops else store


def _ghost_flops(uses: list[Use]) -> int | None:
    """Return the flops of the ghost Gram of all uses of a leaf together."""
    if len(uses) == 1:
        return uses[0].ghost_flops
    sizes = [use.product for use in uses if use.product is not None]
    if len(sizes) < len(uses) or not sizes:
        return None
    first = sizes[0]
    alike = all((s.rows, s.p, s.d) == (first.rows, first.p, first.d) for s in sizes)
    return sizes[0]._replace(n=sum(s.n for s in sizes)).ghost_flops if alike else None


def _layer(name: str, rows: tuple[int, ...], uses: list[Use], size: int, mode: Mode) -> Layer:
    count, numbers = rows[0], 1
    for extent in rows:
        numbers *= extent
    if mode == "ghost":
        flops = _ghost_flops(uses) or 0
    elif mode == "stream":
        flops = 2 * count * numbers + sum(use.flops for use in uses if use.kept)
    else:
        flops = 2 * count * numbers + 2 * numbers
    held = numbers * size if mode == "store" else sum(use.kept for use in uses)
    return Layer(name, tuple(rows[1:]), tuple(use.override for use in uses), mode, flops, held)
