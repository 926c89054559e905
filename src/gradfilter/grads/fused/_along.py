"""Evaluate every row at its own point w + r_m g_m, which differs from w along its own gradient.

The sharpness-aware rule that perturbs every row is this question. M sets of parameters would take
the memory of M models. But g_m is a product of what went into a layer and what came back
(`OuterFactor`), so for a linear layer

    (W + r_m D_mᵀ A_m) x = W x + r_m D_mᵀ (A_m x):

one product that all rows share, and two small ones. Convolutions and tables have forms of their
own. Where a parameter is used in another way, its M values are computed and used instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter.grads.fused._factors import (
    LARGEST,
    EmbeddingFactor,
    Factor,
    OuterFactor,
    TiledFactor,
    along_rows,
)

# --- The parameters of all rows ---


@dataclass(frozen=True, eq=False)
class Move:
    """What every row adds to one leaf: r_m g_m.

    Attributes:
        factor: The gradients g_m of the leaf.
        steps: The numbers r_m. (M,), float32 or wider.
    """

    factor: Factor
    steps: Tensor

    def of(self, value: Tensor) -> Tensor:
        """Return the value of the leaf in every row. (M, *shape)."""
        moves = _tree.at_least_float32(self.factor.rows()).view(-1, *value.shape)
        steps = along_rows(self.steps.to(moves.dtype), moves)
        moved = torch.addcmul(_tree.at_least_float32(value), moves, steps)
        return moved.to(value.dtype)

    def products(self, n: int) -> list[OuterFactor] | None:
        """Return the factors of products, if they are cheaper than the rows for n positions."""
        parts, (p, d) = _parts(self.factor), self.factor.shape
        outer = [
            part
            for part in parts
            if isinstance(part, OuterFactor)
            and (part.outputs.shape[-1], part.inputs.shape[-1]) == (p, d)
        ]
        if len(outer) < len(parts):
            return None
        kept = sum(part.inputs.shape[1] for part in outer)
        # Forward and backward, two small products each; or the rows, and two products with them.
        return outer if 2 * n * kept * (p + d) <= (kept + 2 * n) * p * d else None

    def lookups(self) -> list[EmbeddingFactor] | None:
        """Return the factors of lookups, or None if the leaf was also used in another way."""
        parts = _parts(self.factor)
        found = [part for part in parts if isinstance(part, EmbeddingFactor)]
        return found if len(found) == len(parts) else None


def _parts(factor: Factor) -> list[Factor]:
    return factor.parts if isinstance(factor, TiledFactor) else [factor]


@dataclass(frozen=True, eq=False)
class ParamsAlong(Mapping[str, Tensor]):
    """The parameters of M rows as a mapping to (M, *shape); a leaf is computed when it is read.

    Attributes:
        base: The parameters that all rows share.
        moves: What every row adds to them; leaves without a gradient are absent.
        count: M.
    """

    base: Mapping[str, Tensor]
    moves: Mapping[str, Move]
    count: int

    @override
    def __getitem__(self, name: str) -> Tensor:
        value, move = self.base[name], self.moves.get(name)
        return value.expand(self.count, *value.shape) if move is None else move.of(value)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    @override
    def __len__(self) -> int:
        return len(self.base)


def detached(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return parameters without their graph."""
    if isinstance(params, ParamsAlong):
        return params  # computed without one
    return {name: p.detach() for name, p in params.items()}


def held(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors that the caller may write into."""
    return params.base if isinstance(params, ParamsAlong) else params


# --- Products with the move of a weight ---


def add_products(y: Tensor, x: Tensor, parts: list[OuterFactor], steps: Tensor) -> Tensor:
    """Return y + r_m D_mᵀ A_m x. y (M, n, p), x (M, n, d)."""
    return _add(y, [(part.inputs, part.outputs) for part in parts], x, steps)


def add_transposed(y: Tensor, x: Tensor, parts: list[OuterFactor], steps: Tensor) -> Tensor:
    """Return y + r_m A_mᵀ D_m x, for the gradient of the input. y (M, n, d), x (M, n, p)."""
    return _add(y, [(part.outputs, part.inputs) for part in parts], x, steps)


def _add(y: Tensor, pairs: list[tuple[Tensor, Tensor]], x: Tensor, steps: Tensor) -> Tensor:
    wide = _tree.at_least_float32(y)
    x = _tree.at_least_float32(x)
    steps = along_rows(steps.to(x.dtype), x)
    with _tree.no_autocast(x):
        for first, second in pairs:
            a, b = _tree.at_least_float32(first), _tree.at_least_float32(second)
            if x.shape[1] == a.shape[1] == 1:  # limited by memory bandwidth, not by arithmetic
                wide = torch.addcmul(wide, (x * a).sum(2, keepdim=True) * steps, b)
            else:
                wide = torch.baddbmm(wide, torch.bmm(x, a.mT) * steps, b)
    return wide.to(y.dtype)


def add_lookups(y: Tensor, index: Tensor, parts: list[EmbeddingFactor], steps: Tensor) -> Tensor:
    """Return y plus r_m times the gradients of the units that are looked up. y (M, n, width).

    A unit's gradient is the sum over the positions that looked it up in the pass before.
    """
    wide = _tree.at_least_float32(y)
    for part in parts:
        n, before = index.shape[1], part.index.shape[1]
        step = max(1, LARGEST // max(1, wide.element_size() * n * before))
        sums = []
        for low in range(0, len(index), step):
            some = slice(low, low + step)
            grads = _tree.at_least_float32(part.grads[some])
            same = index[some, :, None] == part.index[some, None, :]
            with _tree.no_autocast(grads):
                sums.append(torch.bmm(same.to(grads.dtype), grads))
        moves = torch.cat(sums)
        wide = torch.addcmul(wide, moves.to(wide.dtype), along_rows(steps.to(wide.dtype), moves))
    return wide.to(y.dtype)


# --- A leaf whose values in every row are computed, and uses that do not see the move ---


class _Own(torch.autograd.Function):
    """The values of all rows, whose gradients are those of the leaf."""

    @staticmethod
    @override
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return grad_outputs[0], None


def own_rows(leaf: Tensor, values: Tensor) -> Tensor:
    """Return the values of all rows (M, *shape), with gradients that reach the leaf."""
    rows: Tensor = _Own.apply(leaf, values)
    return rows


SEES_MOVES = ("_OwnBackward", "_RowFunctionBackward")
"""The nodes of the graph that use a leaf together with its move."""


class Bypassed(RuntimeError):
    """Raised if a parameter was used where the move of its rows is not seen."""


def refuse_bypassed(losses: Tensor, leaves: Iterable[Tensor]) -> None:
    """Refuse a graph in which other nodes than those of overrides use a leaf that has no values.

    Args:
        losses: The losses of the pass.
        leaves: The leaves that move or are sharded.

    Raises:
        Bypassed: There is one, for example in a scripted function.
    """
    ends = {torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves}
    if losses.grad_fn is None:
        return
    found, ahead = {losses.grad_fn}, [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        for after, _ in node.next_functions:
            if after in ends and node.name() not in SEES_MOVES:
                raise Bypassed(
                    f"{node.name()} uses a parameter that is sharded over ranks or differs from "
                    "row to row, in a way that no override sees"
                )
            if after is not None and after not in found and after not in ends:
                found.add(after)
                ahead.append(after)
