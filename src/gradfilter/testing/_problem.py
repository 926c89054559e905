"""Parameters and rows to try a chain on, small, and with no two numbers alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._again import Origin
from gradfilter.grads._dense import DenseStack
from gradfilter.testing._bits import ensure_tensors

M = 5
SHAPES: dict[str, Sequence[int]] = {
    "body.weight": (4, 3),
    "body.conv": (2, 3, 2, 2),
    "head.weight": (3, 2),
    "head.bias": (),
}
# Numbers are drawn as they always are, whatever torch's defaults are.
EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def make_params(
    dtype: torch.dtype = torch.float32, seed: int = 0, shapes: Mapping[str, Sequence[int]] = SHAPES
) -> Params:
    """Normal numbers."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tuple(shape), generator=g, **EXACT).to(dtype)
        for name, shape in shapes.items()
    }


def make_rows(params: Params, seed: int = 1, rows: int = M) -> Tree:
    """Rows that mostly agree, of very different sizes."""
    g = torch.Generator().manual_seed(seed)

    def leaf(p: Tensor) -> Tensor:
        common = torch.randn(p.shape, generator=g, **EXACT)
        own = torch.randn((rows, *p.shape), generator=g, **EXACT)
        size = torch.arange(1, rows + 1, **EXACT).reshape(-1, *[1] * p.ndim)
        return (size * (common + own)).to(p.dtype)

    return {name: leaf(p) for name, p in params.items()}


def make_stack(params: Params, rows: Tree) -> DenseStack:
    """A stack whose gradients at other parameters are known: g_m(p') = g_m + (p' − p) / 2."""

    def evaluate(elsewhere: Params, per_row: bool, kept: Collection[str]) -> DenseStack:
        moved = {
            name: g + 0.5 * (elsewhere[name] - params[name] + torch.zeros_like(g))
            for name, g in rows.items()
        }
        return DenseStack(moved, losses=losses + 1, origin=origin)

    count = len(next(iter(rows.values())))
    losses = torch.arange(count, dtype=torch.float32, device=_tree.device_of(params))
    origin = Origin(count, params, evaluate)
    return DenseStack(rows, losses=losses, origin=origin)


@dataclass(frozen=True)
class Problem:
    """What a chain is tried on.

    Attributes:
        shapes: Of the parameters, by name.
        count: Rows.
        extra: Keywords for every step.
    """

    shapes: Mapping[str, Sequence[int]] = field(default_factory=lambda: SHAPES)
    count: int = M
    extra: Mapping[str, Any] = field(default_factory=dict)

    def params(self, dtype: torch.dtype = torch.float32) -> Params:
        """Parameters of a dtype."""
        return make_params(dtype, shapes=self.shapes)

    def rows(self, params: Params, seed: int = 1) -> Tree:
        """Gradients for parameters: rows, stacked."""
        return make_rows(params, seed, self.count)

    def given(self, params: Params, rows: Tree) -> Any:
        """What a chain is given of them."""
        return make_stack(params, rows)

    def keywords(self, params: Params, rows: Tree) -> dict[str, Any]:
        """Keywords that belong to these gradients."""
        return {}

    def step(
        self, update: Transform, params: Params, state: State, rows: Tree, **extra: Any
    ) -> tuple[Params, State, Out]:
        """One step on these rows."""
        ensure_tensors(state)
        given = {**self.keywords(params, rows), **self.extra, **extra}
        return update(params, state, self.given(params, rows), **given)

    def started(
        self, update: Transform, dtype: torch.dtype = torch.float32
    ) -> tuple[Params, State, Tree]:
        """Parameters and state one step into the work, so that no state is all zeros, and rows."""
        params = self.params(dtype)
        params, state, _ = self.step(update, params, update.init(params), self.rows(params))
        return params, state, self.rows(params, seed=2)


@dataclass(frozen=True)
class TreeProblem(Problem):
    """What a chain is tried on that takes one gradient, of which the caller has the tensors."""

    def rows(self, params: Params, seed: int = 1) -> Tree:
        """The gradient for parameters."""
        return {name: leaf.sum(0) for name, leaf in make_rows(params, seed, self.count).items()}

    def given(self, params: Params, rows: Tree) -> Any:
        """The gradient itself, so that it shows where somebody writes into it."""
        return rows

    def keywords(self, params: Params, rows: Tree) -> dict[str, Any]:
        """How to compute the gradient elsewhere, as in `make_stack`."""
        return {
            "grad_fn": lambda near: {n: g + 0.5 * (near[n] - params[n]) for n, g in rows.items()}
        }
