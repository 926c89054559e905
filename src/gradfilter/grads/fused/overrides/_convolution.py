"""Overrides of convolutions, plain and transposed, in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from gradfilter.grads.fused._conv_factor import ConvFactor
from gradfilter.grads.fused._conv_geometry import Geometry
from gradfilter.grads.fused._factors import DenseFactor
from gradfilter.grads.fused._host import Host, Override, in_autocast
from gradfilter.grads.fused._tape import Weight
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)

# --- Convolutions ---


Sizes = int | Sequence[int]


def conv(dims: int) -> Override:
    """Return the override of `torch.nn.functional.conv1d`, `conv2d` or `conv3d`."""

    def replacement(
        host: Host,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Any:
        if not _runs(host, dims, input, weight, bias):
            return NotImplemented
        input, stride, dilation = host.own(input), _sizes(stride, dims), _sizes(dilation, dims)
        if isinstance(padding, str):
            # "same" pads one more on the right if the total is odd.
            total = [0] * dims if padding == "valid" else _same_padding(weight.shape[2:], dilation)
            if any(t % 2 for t in total):
                sides = [side for t in reversed(total) for side in (0, t % 2)]
                input = F.pad(input, sides)
            padding = [t // 2 for t in total]
        geometry = Geometry(
            dims, stride, _sizes(padding, dims), dilation, False, (0,) * dims, groups
        )
        return _run(host, input, weight, bias, geometry)

    return replacement


def conv_transpose(dims: int) -> Override:
    """Return the override of `torch.nn.functional.conv_transpose1d`, `2d` or `3d`."""

    def replacement(
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
        if not _runs(host, dims, input, weight, bias):
            return NotImplemented
        sizes = (_sizes(v, dims) for v in (stride, padding, dilation, output_padding))
        stride, padding, dilation, output_padding = sizes
        geometry = Geometry(dims, stride, padding, dilation, True, output_padding, groups)
        return _run(host, input, weight, bias, geometry)

    return replacement


def _runs(host: Host, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the override can run the layer, which else has to run under vmap."""
    if not host.wanted(input, weight, bias) or input.ndim not in (dims + 1, dims + 2):
        return False
    return host.weight(weight, moves=True) is not None


def _run(host: Host, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Any:
    x, shared = host.level.lower(host.own(input)), host.weight(weight, moves=True)
    shift = host.weights(bias)
    if shift is not None:
        return host.run("conv", _apply, host, x, shared, *shift, geometry)
    y = host.run("conv", _apply, host, x, shared, None, geometry)
    channels = (-1, *[1] * geometry.dims)
    return y + host.own(bias).to(y.dtype).view(channels)


def _sizes(value: Sizes, dims: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]


def _apply(
    host: Host, x: Tensor, weight: Weight, bias: Weight | None, geometry: Geometry
) -> Tensor:
    if x.ndim == geometry.dims + 2:  # a row of one sample, without a sample axis
        return _apply(host, x.unsqueeze(1), weight, bias, geometry).squeeze(1)
    own = None if weight.move is None else host.moved_values(weight)
    x, weight, bias, no_autocast = in_autocast(x, weight, bias)
    operation = _Conv(geometry)
    if own is not None:
        operation = _ConvWithOwnWeights(geometry, own.to(weight.dtype))
    with no_autocast:
        y = operation.apply(host.tape, x, weight, bias)
    count, samples, _, *extents = (x if geometry.transposed else y).shape
    n = samples * math.prod(extents)
    flops = 2 * count * n * weight.shape.numel()
    ghost = geometry.ghost_flops(count, n, weight.shape)
    kept = (x.numel() + y.numel()) * x.element_size()
    host.used("conv", weight, flops, kept, ghost)
    host.used("conv", bias, y.numel())
    return y


@dataclass(eq=False)
class _Conv(RowOperation[Tensor]):
    geometry: Geometry

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        y = self.geometry.forward(x.flatten(0, 1), weight, bias)
        return y.view(*x.shape[:2], *y.shape[1:]), (x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        (x,) = saved
        inputs = weights = biases = None
        if needs_grad.input:
            flat: Any = self.geometry.input_grad(grad.flatten(0, 1), x.flatten(0, 1), weight)
            plain = flat.is_contiguous()
            inputs = flat.view(x.shape) if plain else flat.unflatten(0, x.shape[:2])
        if needs_grad.weight:
            weights = ConvFactor(x, grad, weight, self.geometry)
        if needs_grad.bias:
            biases = DenseFactor(grad.sum((1, *range(3, grad.ndim))))
        return Gradients(inputs, weights, biases)


@dataclass(eq=False)
class _ConvWithOwnWeights(_Conv):
    """A convolution whose M weights differ.

    Rows of one sample are the groups of one convolution, without a copy. Rows of several samples
    take one call each: as groups they would be copied, and each call has enough work.
    """

    weights: Tensor

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        if x.shape[1] == 1:
            biases = None if bias is None else bias.repeat(x.shape[0])
            y = self._groups(x).forward(_joined(x), self.weights.flatten(0, 1), biases)
            return y.view(x.shape[0], 1, -1, *y.shape[2:]), (x,)
        rows = zip(x.unbind(), self.weights.unbind(), strict=True)
        return torch.stack([self.geometry.forward(row, own, bias) for row, own in rows]), (x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        found = super().backward(grad, saved, weight, bias, needs_grad._replace(input=False))
        if not needs_grad.input:
            return found
        (x,) = saved
        if x.shape[1] == 1:
            weights = self.weights.flatten(0, 1)
            joined = self._groups(x).input_grad(_joined(grad), _joined(x), weights)
            return found._replace(input=joined.reshape(x.shape))
        rows = zip(grad.unbind(), x.unbind(), self.weights.unbind(), strict=True)
        inputs = torch.stack([self.geometry.input_grad(*row) for row in rows])
        return found._replace(input=inputs)

    def _groups(self, x: Tensor) -> Geometry:
        """Return the geometry of all rows as the groups of one convolution."""
        return replace(self.geometry, groups=self.geometry.groups * x.shape[0])


def _joined(rows: Tensor) -> Tensor:
    """Return rows of one sample (M, 1, channels, ...) as the channels of one sample."""
    return rows.reshape(1, -1, *rows.shape[3:])


# --- Memory formats do not change values, and inside vmap a row has no format of its own ---


def without_format(function: Callable[..., Tensor]) -> Override:
    """Return the override of `torch.Tensor.to` and similar, which vmap refuses with a format."""

    def replacement(host: Host, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.pop("memory_format", torch.contiguous_format)
        if named is torch.contiguous_format or not host.level.batched(input):
            return NotImplemented
        return function(input, *args, **kwargs)

    return replacement


FORMATS: dict[Callable[..., Any], Override] = {
    function: without_format(function)
    for function in (torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.clone, torch.clone)
}
