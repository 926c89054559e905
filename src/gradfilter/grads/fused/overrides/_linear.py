"""Overrides of linear layers and of weight normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter.grads.fused._along import add_products, add_transposed
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused._factors import DenseFactor, OuterFactor
from gradfilter.grads.fused._host import Host, in_autocast
from gradfilter.grads.fused._tape import ProductSize, Weight
from gradfilter.grads.fused.overrides._matrix_products import linear_of_view
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)

# --- Linear layers: one product over all rows, weight gradients kept as factors ---


def linear(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Replace `torch.nn.functional.linear` for inputs of any rank."""
    matrix = host.weight(weight, moves=True)
    if matrix is None or weight.ndim != 2:
        return NotImplemented
    if matrix.rows is None and not host.wanted(x, bias):
        return NotImplemented
    if matrix.rows is not None and matrix.leaf is None:
        found = linear_of_view(host, host.own(x), weight, host.own(bias))
        if found is not NotImplemented:
            return found
    x, shift = host.level.lower(host.own(x)), None if bias is None else host.weight(bias)
    if bias is not None and shift is None:  # every row has its own
        y = host.run("linear", _apply, host, x, matrix, None)
        return y + host.own(bias).to(y.dtype)
    return host.run("linear", _apply, host, x, matrix, shift)


def linear_or_vmap(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the override if it can, else run the function under vmap."""
    found = linear(host, x, weight, bias)
    if found is NotImplemented:
        found = under_autocast(F.linear)(*map(host.own, (x, weight, bias)))
    result: Tensor = found
    return result


def _apply(host: Host, x: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
    move, (p, d), n = weight.move, weight.shape, math.prod(x.shape[:-1])
    rows = x.shape[0]
    products = None if move is None else move.products(n // rows)
    own = None if move is None or products is not None else host.moved_values(weight)
    x, weight, bias, no_autocast = in_autocast(x, weight, bias)
    size = ProductSize(rows, n // rows, p, d)
    host.used_in_product("linear", weight, size, x.element_size())
    host.used("linear", bias, n * p)
    operation = _Linear(frozen=weight.rows is None)
    if move is not None and products is not None:
        operation = _LinearAlong(False, products, move.steps)
    if own is not None:
        operation = _LinearWithOwnWeights(False, own.to(weight.dtype))
    with no_autocast:
        return operation.apply(host.tape, x, weight, bias)


@dataclass(eq=False)
class _Linear(RowOperation[Tensor]):
    """y = x Wᵀ + b."""

    frozen: bool

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        return F.linear(x, weight, bias), (None if self.frozen else x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        (x,) = saved
        inputs = grad @ weight if needs_grad.input else None
        outputs = _by_position(grad)
        weights = biases = None
        if needs_grad.weight:
            weights = OuterFactor(_by_position(x), outputs, weight.shape)
        if needs_grad.bias:
            # The sum over one position would be a copy.
            biases = DenseFactor(outputs.squeeze(1) if outputs.shape[1] == 1 else outputs.sum(1))
        return Gradients(inputs, weights, biases)


@dataclass(eq=False)
class _LinearAlong(_Linear):
    """y = x (W + r_m D_mᵀ A_m)ᵀ + b without the M weights.

    Attributes:
        products: The A_m and D_m, one pair for each use of the weight in the pass before.
        steps: The r_m. (M,).
    """

    products: list[OuterFactor]
    steps: Tensor

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        y, rows = F.linear(x, weight, bias), _by_position(x)
        return add_products(_by_position(y), rows, self.products, self.steps).view(y.shape), (x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        found = super().backward(grad, saved, weight, bias, needs_grad)
        if found.input is None:
            return found
        rows, outputs = _by_position(found.input), _by_position(grad)
        inputs = add_transposed(rows, outputs, self.products, self.steps)
        return found._replace(input=inputs.view(found.input.shape))


@dataclass(eq=False)
class _LinearWithOwnWeights(_Linear):
    """y = x W_mᵀ + b with the M weights."""

    weights: Tensor

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        y = torch.bmm(_by_position(x), self.weights.mT).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias, (x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        found = super().backward(grad, saved, weight, bias, needs_grad._replace(input=False))
        if not needs_grad.input:
            return found
        inputs = torch.bmm(_by_position(grad), self.weights)
        return found._replace(input=inputs.view(saved[0].shape))


def _by_position(rows: Tensor) -> Tensor:
    """Return (M, ..., d) as (M, n, d), also where n or d is 0, from which -1 cannot be inferred."""
    shape = rows.shape
    return rows.reshape(shape[0], math.prod(shape[1:-1]), shape[-1])


# --- Weight normalisation: one weight for all rows, its gradient split row by row ---


def weight_norm(host: Host, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """Replace `torch._weight_norm`: w = g v / ‖v‖, norm over all dims but one (−1: over all)."""
    weights = host.weights(v, g)
    if weights is None or not host.batched(v, g):
        return NotImplemented
    args = (host.tape, host.level.lower(v), weights[1], None)
    return host.run("weight_norm", _WeightNorm(dim).apply, *args)


@dataclass(eq=False)
class _WeightNorm(RowOperation[Tensor]):
    """w = g v / ‖v‖; the input is v, and the weight is g.

    ∂g = <∂w, v> / ‖v‖ and ∂v = g/‖v‖ (∂w − v <∂w, v> / ‖v‖²), each per unit.
    """

    dim: int

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        v = x[0]  # the same in every row
        w = torch._weight_norm(v, weight, self.dim)  # pyright: ignore[reportPrivateImportUsage]  # as weight_norm
        return w.expand(x.shape[0], *w.shape), (v,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        v, g, grad = (_tree.at_least_float32(t) for t in (*saved, weight, grad))
        over = [d for d in range(v.ndim) if d != self.dim % v.ndim or self.dim == -1]
        norm: Tensor = torch.linalg.vector_norm(v, dim=over, keepdim=True)
        along = (grad * v).sum([d + 1 for d in over], keepdim=True) / norm
        dtype = saved[0].dtype
        per_row = along.to(dtype).reshape(grad.shape[0], *g.shape)
        inputs = (g / norm * (grad - v / norm * along)).to(dtype) if needs_grad.input else None
        return Gradients(inputs, DenseFactor(per_row) if needs_grad.weight else None)
