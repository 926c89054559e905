"""LayerNorm and RMSNorm: all rows in one kernel, gains and shifts summed row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._dense_factor import DenseFactor
from gradfilter.grads._lift import autocast_dtype
from gradfilter.grads._rules._host import Host, rows_of
from gradfilter.grads._tape import Tape, Weight

LARGE_ROW = 2**13
"""From so many numbers on a row is worth a kernel call of its own."""


def layer_norm(
    host: Host,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """`torch.nn.functional.layer_norm`."""
    weights = host.weights(weight, bias)
    if weights is None or not host.batched(input, weight, bias):
        return NotImplemented
    if not host.batched(weight, bias) and not _mixed(input, weight):
        return NotImplemented
    if autocast_dtype(input.device) and input.device.type != "cpu":
        return NotImplemented  # there it computes in float32
    x = host.level.lower(input)
    return host.run("layer_norm", _layer_norm, host, x, list(normalized_shape), *weights, eps)


def rms_norm(
    host: Host,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """`torch.nn.functional.rms_norm`."""
    weights = host.weights(weight)
    if weights is None or not host.batched(weight) or _mixed(input, weight):
        return NotImplemented
    if eps is None:  # that of the dtype in which the mean is taken
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    x = host.level.lower(input)
    return host.run("rms_norm", _rms_norm, host, x, len(normalized_shape), *weights, eps)


def _mixed(input: Tensor, weight: Tensor | None) -> bool:
    """Whether autocast has left input and weight in two dtypes."""
    different = weight is not None and input.dtype != weight.dtype
    return different and autocast_dtype(input.device) is not None


def _layer_norm(
    host: Host,
    x: Tensor,
    shape: list[int],
    weight: Weight | None,
    bias: Weight | None,
    eps: float,
) -> Tensor:
    host.used("layer_norm", weight, x.numel())
    host.used("layer_norm", bias, x.numel())
    args = (rows_of(weight), rows_of(bias), shape, weight, bias, eps, host.tape)
    y: Tensor = _LayerNorm.apply(x, *args)
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        shape: list[int],
        weight: Weight | None,
        bias: Weight | None,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        w, b = (None if p is None else p.value for p in (weight, bias))
        y, mean, inverse = torch.native_layer_norm(x, shape, w, b, eps)
        ctx.save_for_backward(x, mean, inverse)
        ctx.shape, ctx.weight, ctx.bias, ctx.tape = shape, weight, bias, tape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mean, inverse = ctx.saved_tensors
        w, b = (None if p is None else p.value for p in (ctx.weight, ctx.bias))
        backward = torch.ops.aten.native_layer_norm_backward
        wanted = list(ctx.needs_input_grad[:3])
        if x[0].numel() >= LARGE_ROW:
            per_row = [
                backward(grad[m], x[m], ctx.shape, mean[m], inverse[m], w, b, wanted)
                for m in range(len(x))
            ]
            found = [None if g[0] is None else torch.stack(g) for g in zip(*per_row, strict=True)]
        else:
            only_input = [wanted[0], False, False]
            found = list(backward(grad, x, ctx.shape, mean, inverse, w, b, only_input))
            found[1] = _sums(grad * ((x - mean) * inverse), ctx.shape) if wanted[1] else None
            found[2] = _sums(grad, ctx.shape) if wanted[2] else None
        grads = [found[0], None, None]
        for place, own in ((1, ctx.weight), (2, ctx.bias)):
            rows = found[place]
            if wanted[place] and rows is not None:
                grads[place] = ctx.tape.record(own, DenseFactor(rows))
        return (*grads, None, None, None, None, None)


def _sums(products: Tensor, shape: Sequence[int]) -> Tensor:
    """Per row, the sum over all but the normalised dims. (M, *shape)."""
    return products.reshape(len(products), -1, *shape).sum(1)


def _rms_norm(host: Host, x: Tensor, dims: int, weight: Weight, eps: float) -> Tensor:
    host.used("rms_norm", weight, x.numel())
    y: Tensor = _RMSNorm.apply(x, rows_of(weight), dims, weight, eps, host.tape)
    return y


class _RMSNorm(torch.autograd.Function):
    """y = w x r, r = (mean x² + ε)^(-1/2), in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor,
        dims: int,
        weight: Weight,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        ctx.dims = dims
        wide = _tree.at_least_float32(x)
        norm = torch.linalg.vector_norm(wide, dim=list(range(-dims, 0)), keepdim=True)
        inverse = (norm.square() / weight.value.numel() + eps).rsqrt()
        ctx.save_for_backward(x, inverse)
        ctx.weight, ctx.tape = weight, tape
        y: Tensor = (wide * inverse).mul_(weight.value)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # With u = x r: dw = Σ g u, and dx = r (w g − u mean(w g u)). Few passes over the memory.
        x, inverse = ctx.saved_tensors
        w = _tree.at_least_float32(ctx.weight.value)
        unit, grad = _tree.at_least_float32(x) * inverse, _tree.at_least_float32(grad)
        products = grad * unit
        inputs = weights = None
        if ctx.needs_input_grad[0]:
            along = products.flatten(-ctx.dims) @ w.flatten() / w.numel()
            inputs = torch.addcmul(grad * w, unit, along.view(inverse.shape), value=-1)
            inputs = inputs.mul_(inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = _sums(products, w.shape).to(ctx.weight.value.dtype)
            weights = ctx.tape.record(ctx.weight, DenseFactor(rows))
        return inputs, weights, None, None, None, None
