"""Overrides of convolutions, plain and transposed, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads.fused._conv_factor import ConvFactor, Geometry
from gradfilter.grads.fused._factors import DenseFactor, ghost_flops
from gradfilter.grads.fused._host import Host, Override, in_autocast, rows_of, without_view
from gradfilter.grads.fused._tape import Tape, Weight

# --- Convolutions ---


Sizes = int | Sequence[int]


def conv(dims: int) -> Override:
    """Return the override of `torch.nn.functional.conv1d`, `conv2d` or `conv3d`."""

    def override(
        host: Host,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Any:
        weights = host.weights(weight, bias)
        if (
            weights is None
            or not host.wanted(input, weight, bias)
            or input.ndim not in (dims + 1, dims + 2)
        ):
            return NotImplemented
        stride, dilation = _sizes(stride, dims), _sizes(dilation, dims)
        if isinstance(padding, str):
            # "same" pads one more on the right if the total is odd.
            total = [0] * dims if padding == "valid" else _same(weight.shape[2:], dilation)
            if any(t % 2 for t in total):
                sides = [side for t in reversed(total) for side in (0, t % 2)]
                input = F.pad(input, sides)
            padding = [t // 2 for t in total]
        geometry = Geometry(
            dims, stride, _sizes(padding, dims), dilation, False, (0,) * dims, groups
        )
        return host.run("conv", _apply, host, host.level.lower(input), *weights, geometry)

    return override


def conv_transpose(dims: int) -> Override:
    """Return the override of `torch.nn.functional.conv_transpose1d`, `2d` or `3d`."""

    def override(
        host: Host,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Any:
        weights = host.weights(weight, bias)
        if (
            weights is None
            or not host.wanted(input, weight, bias)
            or input.ndim not in (dims + 1, dims + 2)
        ):
            return NotImplemented
        sizes = (_sizes(v, dims) for v in (stride, padding, dilation, output_padding))
        stride, padding, dilation, output_padding = sizes
        geometry = Geometry(dims, stride, padding, dilation, True, output_padding, groups)
        return host.run("conv", _apply, host, host.level.lower(input), *weights, geometry)

    return override


def _sizes(value: Sizes, dims: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _same(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]


def _apply(
    host: Host, x: Tensor, weight: Weight, bias: Weight | None, geometry: Geometry
) -> Tensor:
    if x.ndim == geometry.dims + 2:  # a row of one sample, without a sample axis
        return _apply(host, x.unsqueeze(1), weight, bias, geometry).squeeze(1)
    x, weight, bias, no_autocast = in_autocast(x, weight, bias)
    with no_autocast:
        y: Tensor = _Conv.apply(
            x, rows_of(weight), rows_of(bias), weight, bias, geometry, host.tape
        )
    small = x if geometry.transposed else y
    n = small.numel() // (len(x) * small.shape[2])
    flops = 2 * len(x) * n * weight.value.numel()
    ghost = None
    if geometry.groups == 1 and not geometry.transposed:
        ghost = ghost_flops(len(x), n, len(weight.value), weight.value[0].numel())
    host.used("conv", weight, flops, x.nbytes + y.nbytes, ghost)
    host.used("conv", bias, y.numel())
    return y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        weight: Weight,
        bias: Weight | None,
        geometry: Geometry,
        tape: Tape,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.geometry, ctx.tape = weight, bias, geometry, tape
        y = geometry.forward(x.flatten(0, 1), weight.value, None if bias is None else bias.value)
        return without_view(y.view(*x.shape[:2], *y.shape[1:]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        (x,) = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 3
        if ctx.needs_input_grad[0]:
            flat = ctx.geometry.input_grad(grad.flatten(0, 1), x.flatten(0, 1), ctx.weight.value)
            grads[0] = (
                flat.view(x.shape) if flat.is_contiguous() else flat.unflatten(0, x.shape[:2])
            )
        if ctx.needs_input_grad[1]:
            factor = ConvFactor(x, grad, ctx.weight.value, ctx.geometry)
            grads[1] = ctx.tape.record(ctx.weight, factor)
        if ctx.needs_input_grad[2]:
            sums = grad.sum((1, *range(3, grad.ndim)))
            grads[2] = ctx.tape.record(ctx.bias, DenseFactor(sums))
        return (*grads, None, None, None, None)


# --- Memory formats do not change values, and inside vmap a row has no format of its own ---


def without_format(function: Callable[..., Tensor]) -> Override:
    """Return the override of `torch.Tensor.to` and similar, which vmap refuses with a format."""

    def override(host: Host, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.pop("memory_format", torch.contiguous_format)
        if named is torch.contiguous_format or not host.level.batched(input):
            return NotImplemented
        return function(input, *args, **kwargs)

    return override


FORMATS: dict[Callable[..., Any], Override] = {
    function: without_format(function)
    for function in (torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.clone, torch.clone)
}
