"""Overrides of linear layers and of weight normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused._factors import DenseFactor, OuterFactor, ghost_flops
from gradfilter.grads.fused._host import Host, in_autocast, rows_of, without_view
from gradfilter.grads.fused._tape import Tape, Weight

# --- Linear layers: one product over all rows, weight gradients kept as factors ---


def linear(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Replace `torch.nn.functional.linear` for inputs of any rank."""
    weights = host.weights(weight, bias)
    if weights is None or not host.wanted(x, weight, bias) or weight.ndim != 2:
        return NotImplemented
    return host.run("linear", _apply, host, host.level.lower(x), *weights)


def linear_or_vmap(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the override if it can, else run the function under vmap."""
    found = linear(host, x, weight, bias)
    if found is NotImplemented:
        found = under_autocast(F.linear)(x, weight, bias)
    result: Tensor = found
    return result


def _apply(host: Host, x: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
    x, weight, bias, no_autocast = in_autocast(x, weight, bias)
    p, d = weight.value.shape
    n = x.numel() // d if d else 0
    kept = n * (p + d) * x.element_size()
    host.used("linear", weight, 2 * n * p * d, kept, ghost_flops(len(x), n // len(x), p, d))
    host.used("linear", bias, n * p)
    with no_autocast:
        args = (rows_of(weight), rows_of(bias), weight, bias, host.tape)
        y: Tensor = _Linear.apply(x, *args)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        weight: Weight,
        bias: Weight | None,
        tape: Tape,
    ) -> Tensor:
        ctx.save_for_backward(x if weight_rows is not None else None)
        ctx.weight, ctx.bias, ctx.tape = weight, bias, tape
        return without_view(F.linear(x, weight.value, None if bias is None else bias.value))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        (x,) = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 3
        if ctx.needs_input_grad[0]:
            grads[0] = grad @ ctx.weight.value
        outputs = grad.reshape(len(grad), -1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(len(x), -1, x.shape[-1])
            factor = OuterFactor(inputs, outputs, ctx.weight.value.shape)
            grads[1] = ctx.tape.record(ctx.weight, factor)
        if ctx.needs_input_grad[2]:
            grads[2] = ctx.tape.record(ctx.bias, DenseFactor(outputs.sum(1)))
        return (*grads, None, None, None)


# --- Weight normalisation: one weight for all rows, its gradient split row by row ---


def weight_norm(host: Host, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """Replace `torch._weight_norm`: w = g v / ‖v‖, norm over all dims but one (−1: over all)."""
    weights = host.weights(v, g)
    if weights is None or not host.batched(v, g):
        return NotImplemented
    rows = [host.level.lower(t) for t in (v, g)]
    return host.run("weight_norm", _WeightNorm.apply, *rows, dim)


class _WeightNorm(torch.autograd.Function):
    """∂g = <∂w, v> / ‖v‖ and ∂v = g/‖v‖ (∂w − v <∂w, v> / ‖v‖²), each per unit."""

    @staticmethod
    def forward(ctx: Any, v_rows: Tensor, g_rows: Tensor, dim: int) -> Tensor:
        v, g = v_rows[0], g_rows[0]
        ctx.save_for_backward(v, g)
        ctx.over = [d for d in range(v.ndim) if d != dim % v.ndim or dim == -1]
        weight = torch._weight_norm(v, g, dim)  # pyright: ignore[reportPrivateImportUsage]  # as weight_norm
        return weight.expand(len(v_rows), *weight.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        v, g = (_tree.at_least_float32(t) for t in ctx.saved_tensors)
        norm: Tensor = torch.linalg.vector_norm(v, dim=ctx.over, keepdim=True)
        grad = _tree.at_least_float32(grad)
        along = (grad * v).sum([d + 1 for d in ctx.over], keepdim=True) / norm
        dtype = ctx.saved_tensors[0].dtype
        per_row = (along.to(dtype)).reshape(len(grad), *g.shape)
        return (g / norm * (grad - v / norm * along)).to(dtype), per_row, None
