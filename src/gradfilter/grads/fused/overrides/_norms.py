"""Overrides of BatchNorm, GroupNorm, InstanceNorm, LayerNorm and RMSNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter.grads._buffer_watch import RunningStatistics
from gradfilter.grads._one_image import straight
from gradfilter.grads.fused._factors import DenseFactor
from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import autocast_dtype, is_shared
from gradfilter.grads.fused._tape import Weight
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)

# --- BatchNorm: each microbatch has its own statistics; running statistics update in order ---


def batch_norm(
    host: Host,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Replace `torch.nn.functional.batch_norm`."""
    if not host.level.batched(input) or input.ndim < 2 or host.batched(running_mean, running_var):
        return NotImplemented
    x = host.level.lower(input)
    if is_shared(x):
        return NotImplemented  # the input is a weight, as in weight standardisation
    if training and input.numel() == input.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    weights = host.weights(weight, bias)
    if weights is None:
        args = (running_mean, running_var, None, None, training, momentum, eps)
        y = batch_norm(host, input, *args)
        if y is NotImplemented:  # only the input has rows: vmap is correct and fast
            host.running.read(running_mean, running_var)
            y = F.batch_norm(input, *args)
        return own_affine(y, weight, bias)
    if not training:
        if running_mean is None or running_var is None:
            return NotImplemented
        # vmap does not mix dtypes.
        if not host.batched(weight, bias) and input.dtype == running_mean.dtype:
            return NotImplemented
        host.running.read(running_mean, running_var)
        return _run(
            host, "batch_norm", _GivenStatistics(running_mean, running_var, eps), x, weights
        )
    running = host.running.start(
        running_mean, running_var, momentum, x, hold=not host.checkpoints.inside
    )
    return _run(host, "batch_norm", _BatchNorm(running, eps), x, weights)


def _run(
    host: Host,
    override: str,
    norm: RowOperation[Any],
    x: Tensor,
    weights: tuple[Weight | None, ...],
) -> Any:
    """Run a norm on the tensor of all rows, and note its use of weight and bias."""
    weight, bias = weights
    host.used(override, weight, x.numel())
    host.used(override, bias, x.numel())
    return host.run(override, norm.apply, host.tape, x, weight, bias)


def own_affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply gains and shifts that differ between rows, in the dtype of their input."""
    per_channel = (1, -1, *[1] * (y.ndim - 2))
    found = y if weight is None else y * weight.view(per_channel)
    found = found if bias is None else found + bias.view(per_channel)
    return found.to(y.dtype)


@dataclass(eq=False)
class _BatchNorm(RowOperation[Tensor | None]):
    """y = w (x − mean) / √(var + ε) + b with each row's own statistics, in training mode.

    Attributes:
        running: For every row the running mean and variance, which are updated, and the momentum.
        eps: ε.
    """

    running: list[RunningStatistics]
    eps: float

    @override
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Saved]:
        wide = x.dtype in (torch.float32, torch.float64)  # else torch's own choice
        if x.ndim == 5 and wide and _is_plain(x[0]):
            means, inverses = x.new_empty(2, x.shape[0], x.shape[2])
            y = torch.empty_like(x)
            for m, (mean, var, rate) in enumerate(self.running):
                out = (y[m], means[m], inverses[m])
                torch.native_batch_norm(
                    x[m], weight, bias, mean, var, True, rate, self.eps, out=out
                )
        else:  # torch lays out and rounds differently when it writes into a given output
            found = [
                torch.native_batch_norm(x[m], weight, bias, mean, var, True, rate, self.eps)
                for m, (mean, var, rate) in enumerate(self.running)
            ]
            y, means, inverses = map(torch.stack, zip(*found, strict=True))
        return y, (x, means, inverses)

    @override
    def backward(
        self,
        grad: Tensor,
        saved: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        x, means, inverses = saved
        per_row = [
            torch.ops.aten.native_batch_norm_backward(
                straight(grad[m]),
                straight(x[m]),
                weight,
                None,
                None,
                means[m],
                inverses[m],
                True,
                self.eps,
                list(needs_grad),
            )
            for m in range(len(x))
        ]
        return _stacked(per_row, needs_grad)


def _stacked(per_row: Sequence[Any], needs_grad: NeedsGrad) -> Gradients:
    """Stack the results of a norm's backward kernel in every row."""
    kinds = zip(*per_row, strict=True)
    inputs, weights, biases = (
        torch.stack(rows) if needed else None
        for rows, needed in zip(kinds, needs_grad, strict=True)
    )
    return Gradients(
        inputs,
        None if weights is None else DenseFactor(weights),
        None if biases is None else DenseFactor(biases),
    )


@dataclass(eq=False)
class _GivenStatistics(RowOperation[Tensor | None]):
    """y = w (x − mean) / √(var + ε) + b, in evaluation mode."""

    mean: Tensor
    var: Tensor
    eps: float

    @override
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Saved]:
        args = (weight, bias, self.mean, self.var, False, 0.0, self.eps)
        flat = torch.native_batch_norm(x.flatten(0, 1), *args)[0]
        return flat.view(x.shape), (x, self.mean.clone(), (self.var + self.eps).rsqrt())

    @override
    def backward(
        self,
        grad: Tensor,
        saved: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        x, mean, inverse = saved
        per_channel = (-1, *[1] * (x.ndim - 3))
        over = (1, *range(3, x.ndim))
        inputs = weights = biases = None
        if needs_grad.input:
            gain = inverse if weight is None else inverse * weight
            inputs = (grad * gain.view(per_channel)).to(x.dtype)
        if needs_grad.weight:
            unit = (x - mean.view(per_channel)) * inverse.view(per_channel)
            weights = DenseFactor((grad * unit).sum(over))
        if needs_grad.bias:
            biases = DenseFactor(grad.sum(over))
        return Gradients(inputs, weights, biases)


def _is_plain(row: Tensor) -> bool:
    """Return whether a row is contiguous, in either memory format."""
    channels_last = row.ndim == 4 and row.is_contiguous(memory_format=torch.channels_last)
    return row.is_contiguous() or channels_last


# --- GroupNorm and InstanceNorm: one kernel over all rows, gains and shifts summed row by row ---


def group_norm(
    host: Host,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Replace `torch.nn.functional.group_norm`."""
    weights = host.weights(weight, bias)
    if weights is None or not host.batched(input, weight, bias) or input.ndim < 2:
        return NotImplemented
    mixed = weight is not None and input.dtype != weight.dtype and autocast_dtype(input.device)
    if not host.batched(weight, bias) and not mixed:
        return NotImplemented
    if autocast_dtype(input.device) and input.device.type != "cpu":
        return NotImplemented  # torch computes it in float32
    x = host.level.lower(input)
    return _run(host, "group_norm", _GroupNorm(num_groups, eps), x, weights)


def instance_norm(
    host: Host,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Replace `torch.nn.functional.instance_norm`, a group norm with groups of one channel."""
    if not use_input_stats:
        args = (running_mean, running_var, weight, bias, False, momentum, eps)
        return batch_norm(host, input, *args)
    if not host.batched(input) or host.batched(running_mean, running_var):
        return NotImplemented
    weights = host.weights(weight, bias)
    if weights is None:
        args = (running_mean, running_var, None, None, True, momentum, eps)
        y = instance_norm(host, input, *args)
        y = F.instance_norm(input, *args) if y is NotImplemented else y
        return own_affine(y, weight, bias)
    if input.ndim < 3 or input[0, 0].numel() == 1:
        return NotImplemented
    if autocast_dtype(input.device) and input.device.type != "cpu":
        return NotImplemented
    x = host.level.lower(input)
    if running_mean is not None:
        running = host.running.start(
            running_mean, running_var, momentum, x, _update, hold=not host.checkpoints.inside
        )
        for m, statistics in enumerate(running):
            _update(x[m].detach(), *statistics)
    return _run(host, "instance_norm", _GroupNorm(x.shape[2], eps), x, weights)


def _update(x: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> None:
    F.instance_norm(x, mean, var, None, None, True, momentum)


@dataclass(eq=False)
class _GroupNorm(RowOperation[Tensor | None]):
    groups: int
    eps: float

    @override
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Saved]:
        x = x.contiguous()
        count, samples, channels, positions = self._sizes(x)
        sizes = (count * samples, channels, positions, self.groups)
        y, mean, inverse = torch.native_group_norm(x.flatten(0, 1), weight, bias, *sizes, self.eps)
        return y.view(x.shape), (x, mean, inverse)

    @override
    def backward(
        self,
        grad: Tensor,
        saved: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        x, mean, inverse = saved
        count, samples, channels, positions = self._sizes(x)
        grad = grad.contiguous()
        inputs = weights = biases = None
        if needs_grad.input:
            sizes = (count * samples, channels, positions, self.groups)
            inputs = torch.ops.aten.native_group_norm_backward(
                grad.flatten(0, 1),
                x.flatten(0, 1),
                mean,
                inverse,
                weight,
                *sizes,
                [True, False, False],
            )[0].view(x.shape)
        # Sum over positions first: the rest needs only two numbers per sample and channel.
        shift = grad.view(count, samples, channels, positions).sum(3)
        if needs_grad.weight:
            per_group = (count, samples, self.groups, 1)
            mean, inverse = mean.view(per_group), inverse.view(per_group)
            products = (grad * x).view(count, samples, self.groups, -1, positions).sum(4)
            centred = products - mean * shift.view(count, samples, self.groups, -1)
            rows = (centred * inverse).reshape(count, samples, channels).sum(1)
            weights = DenseFactor(rows)
        if needs_grad.bias:
            biases = DenseFactor(shift.sum(1))
        return Gradients(inputs, weights, biases)

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        """Return the numbers of rows, of samples in a row, of channels, and of positions."""
        count, samples, channels, *extents = x.shape
        return count, samples, channels, math.prod(extents)


# --- LayerNorm and RMSNorm: one kernel over all rows, gains and shifts summed row by row ---


LARGE_ROW = 2**13
"""The number of elements from which a row gets a kernel call of its own."""


def layer_norm(
    host: Host,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Replace `torch.nn.functional.layer_norm`."""
    weights = host.weights(weight, bias)
    if weights is None or not host.batched(input, weight, bias):
        return NotImplemented
    if not host.batched(weight, bias) and not _mixed(input, weight):
        return NotImplemented
    if autocast_dtype(input.device) and input.device.type != "cpu":
        return NotImplemented  # torch computes it in float32
    x = host.level.lower(input)
    return _run(host, "layer_norm", _LayerNorm(list(normalized_shape), eps), x, weights)


def rms_norm(
    host: Host,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Replace `torch.nn.functional.rms_norm`."""
    weights = host.weights(weight)
    if weights is None or not host.batched(weight) or _mixed(input, weight):
        return NotImplemented
    if eps is None:  # the eps of the dtype in which the mean is computed
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    x = host.level.lower(input)
    return _run(host, "rms_norm", _RMSNorm(len(normalized_shape), eps), x, (*weights, None))


def _mixed(input: Tensor, weight: Tensor | None) -> bool:
    """Return whether input and weight have two dtypes under autocast."""
    different = weight is not None and input.dtype != weight.dtype
    return different and autocast_dtype(input.device) is not None


@dataclass(eq=False)
class _LayerNorm(RowOperation[Tensor | None]):
    shape: list[int]
    eps: float

    @override
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Saved]:
        y, mean, inverse = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (x, mean, inverse)

    @override
    def backward(
        self,
        grad: Tensor,
        saved: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        x, mean, inverse = saved
        kernel, shape = torch.ops.aten.native_layer_norm_backward, self.shape
        if math.prod(x.shape[1:]) >= LARGE_ROW:
            per_row = [
                kernel(grad[m], x[m], shape, mean[m], inverse[m], weight, bias, list(needs_grad))
                for m in range(len(x))
            ]
            return _stacked(per_row, needs_grad)
        only_input = [needs_grad.input, False, False]
        inputs = kernel(grad, x, shape, mean, inverse, weight, bias, only_input)[0]
        weights = biases = None
        if needs_grad.weight:
            weights = DenseFactor(_sums(grad * ((x - mean) * inverse), shape))
        if needs_grad.bias:
            biases = DenseFactor(_sums(grad, shape))
        return Gradients(inputs, weights, biases)


@dataclass(eq=False)
class _RMSNorm(RowOperation[Tensor]):
    """y = w x r, r = (mean x² + ε)^(-1/2), in float32 or wider, over the last ``dims`` dims."""

    dims: int
    eps: float

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        wide = _tree.at_least_float32(x)
        norm = torch.linalg.vector_norm(wide, dim=list(range(-self.dims, 0)), keepdim=True)
        inverse = (norm.square() / weight.numel() + self.eps).rsqrt()
        y: Tensor = (wide * inverse).mul_(weight)
        return y.to(x.dtype), (x, inverse)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        # With u = x r: dw = Σ g u, and dx = r (w g − u mean(w g u)). Few memory passes.
        x, inverse = saved
        w = _tree.at_least_float32(weight)
        unit, grad = _tree.at_least_float32(x) * inverse, _tree.at_least_float32(grad)
        products = grad * unit
        inputs = weights = None
        if needs_grad.input:
            along = products.flatten(-self.dims) @ w.flatten() / w.numel()
            inputs = torch.addcmul(grad * w, unit, along.view(inverse.shape), value=-1)
            inputs = inputs.mul_(inverse).to(x.dtype)
        if needs_grad.weight:
            weights = DenseFactor(_sums(products, w.shape).to(weight.dtype))
        return Gradients(inputs, weights)


def _sums(products: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum over all dims but the normalised ones, row by row. (M, *shape)."""
    positions = math.prod(products.shape[1 : products.ndim - len(shape)])
    return products.reshape(products.shape[0], positions, *shape).sum(1)
