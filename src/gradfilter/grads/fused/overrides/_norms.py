"""Overrides of BatchNorm, GroupNorm, InstanceNorm, LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._one_image import straight
from gradfilter.grads.fused._factors import DenseFactor
from gradfilter.grads.fused._host import Host, rows_of, without_view
from gradfilter.grads.fused._lift import autocast_dtype, shared
from gradfilter.grads.fused._tape import Tape, Weight

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
    if shared(x):
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
        return host.run("batch_norm", _evaluate, host, x, running_mean, running_var, *weights, eps)
    update = host.running.start(running_mean, running_var, momentum, x)
    return host.run("batch_norm", _train, host, x, update, *weights, eps)


def own_affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply gains and shifts that differ between rows, in the dtype of their input."""
    per_channel = (1, -1, *[1] * (y.ndim - 2))
    found = y if weight is None else y * weight.view(per_channel)
    found = found if bias is None else found + bias.view(per_channel)
    return found.to(y.dtype)


def _train(
    host: Host, x: Tensor, update: Any, weight: Weight | None, bias: Weight | None, eps: float
) -> Tensor:
    host.used("batch_norm", weight, x.numel())
    host.used("batch_norm", bias, x.numel())
    args = (rows_of(weight), rows_of(bias), weight, bias, update, eps, host.tape)
    y: Tensor = _BatchNorm.apply(x, *args)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        weight: Weight | None,
        bias: Weight | None,
        update: Any,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        w, b = (None if p is None else p.value for p in (weight, bias))
        wide = x.dtype in (torch.float32, torch.float64)  # else torch's own choice
        if x.ndim == 5 and wide and _is_plain(x[0]):
            means, inverses = x.new_empty(2, len(x), x.shape[2])
            y = torch.empty_like(x)
            for m in range(len(x)):
                out, (mean, var, rate) = (y[m], means[m], inverses[m]), update(m)
                torch.native_batch_norm(x[m], w, b, mean, var, True, rate, eps, out=out)
        else:  # torch lays out and rounds differently when it writes into a given output
            found = [
                torch.native_batch_norm(x[m], w, b, mean, var, True, rate, eps)
                for m, (mean, var, rate) in enumerate(map(update, range(len(x))))
            ]
            y, means, inverses = map(torch.stack, zip(*found, strict=True))
        ctx.save_for_backward(x, means, inverses)
        ctx.weight, ctx.bias, ctx.eps, ctx.tape = weight, bias, eps, tape
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        x, means, inverses = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        w = None if ctx.weight is None else ctx.weight.value
        per_row = [
            torch.ops.aten.native_batch_norm_backward(
                straight(grad[m]),
                straight(x[m]),
                w,
                None,
                None,
                means[m],
                inverses[m],
                True,
                ctx.eps,
                wanted,
            )
            for m in range(len(x))
        ]
        inputs, weights, biases = zip(*per_row, strict=True)
        grads: list[Tensor | None] = [torch.stack(inputs) if wanted[0] else None, None, None]
        if wanted[1]:
            grads[1] = ctx.tape.record(ctx.weight, DenseFactor(torch.stack(weights)))
        if wanted[2]:
            grads[2] = ctx.tape.record(ctx.bias, DenseFactor(torch.stack(biases)))
        return (*grads, None, None, None, None, None)


def _evaluate(
    host: Host,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Weight | None,
    bias: Weight | None,
    eps: float,
) -> Tensor:
    host.used("batch_norm", weight, x.numel())
    host.used("batch_norm", bias, x.numel())
    args = (rows_of(weight), rows_of(bias), mean, var, weight, bias, eps, host.tape)
    y: Tensor = _GivenStatistics.apply(x, *args)
    return y


class _GivenStatistics(torch.autograd.Function):
    """y = w (x − mean) / √(var + ε) + b, in evaluation mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Weight | None,
        bias: Weight | None,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        w, b = (None if p is None else p.value for p in (weight, bias))
        ctx.save_for_backward(x, mean.clone(), (var + eps).rsqrt())
        ctx.weight, ctx.bias, ctx.tape = weight, bias, tape
        flat = torch.native_batch_norm(x.flatten(0, 1), w, b, mean, var, False, 0.0, eps)[0]
        return without_view(flat.view(x.shape))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        x, mean, inverse = ctx.saved_tensors
        per_channel = (-1, *[1] * (x.ndim - 3))
        over = (1, *range(3, x.ndim))
        grads: list[Tensor | None] = [None] * 3
        if ctx.needs_input_grad[0]:
            gain = inverse if ctx.weight is None else inverse * ctx.weight.value
            grads[0] = (grad * gain.view(per_channel)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            unit = (x - mean.view(per_channel)) * inverse.view(per_channel)
            grads[1] = ctx.tape.record(ctx.weight, DenseFactor((grad * unit).sum(over)))
        if ctx.needs_input_grad[2]:
            grads[2] = ctx.tape.record(ctx.bias, DenseFactor(grad.sum(over)))
        return (*grads, None, None, None, None, None, None)


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
    return host.run("group_norm", _apply, host, "group_norm", x, num_groups, *weights, eps)


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
        statistics = (running_mean, running_var)
        return batch_norm(host, input, *statistics, weight, bias, False, momentum, eps)
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
        update = host.running.start(running_mean, running_var, momentum, x, _update)
        for m in range(len(x)):
            _update(x[m].detach(), *update(m))
    return host.run("instance_norm", _apply, host, "instance_norm", x, x.shape[2], *weights, eps)


def _update(x: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> None:
    F.instance_norm(x, mean, var, None, None, True, momentum)


def _apply(
    host: Host,
    override: str,
    x: Tensor,
    groups: int,
    weight: Weight | None,
    bias: Weight | None,
    eps: float,
) -> Tensor:
    host.used(override, weight, x.numel())
    host.used(override, bias, x.numel())
    args = (rows_of(weight), rows_of(bias), groups, weight, bias, eps, host.tape)
    y: Tensor = _GroupNorm.apply(x.contiguous(), *args)
    return y


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        groups: int,
        weight: Weight | None,
        bias: Weight | None,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        w, b = (None if p is None else p.value for p in (weight, bias))
        count, samples, channels = x.shape[:3]
        ctx.sizes = count, samples, channels, x[0, 0, 0].numel(), groups
        y, mean, inverse = torch.native_group_norm(
            x.flatten(0, 1), w, b, count * samples, channels, ctx.sizes[3], groups, eps
        )
        ctx.save_for_backward(x, mean, inverse)
        ctx.weight, ctx.bias, ctx.tape = weight, bias, tape
        return without_view(y.view(x.shape))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        x, mean, inverse = ctx.saved_tensors
        count, samples, channels, positions, groups = ctx.sizes
        grad, wanted = grad.contiguous(), ctx.needs_input_grad[:3]
        w = None if ctx.weight is None else ctx.weight.value
        grads: list[Tensor | None] = [None] * 3
        if wanted[0]:
            flat = torch.ops.aten.native_group_norm_backward(
                grad.flatten(0, 1),
                x.flatten(0, 1),
                mean,
                inverse,
                w,
                count * samples,
                channels,
                positions,
                groups,
                [True, False, False],
            )[0]
            grads[0] = flat.view(x.shape)
        # Sum over positions first: the rest needs only two numbers per sample and channel.
        shift = grad.view(count, samples, channels, positions).sum(3)
        if wanted[1]:
            per_group = (count, samples, groups, 1)
            mean, inverse = mean.view(per_group), inverse.view(per_group)
            products = (grad * x).view(count, samples, groups, -1, positions).sum(4)
            centred = products - mean * shift.view(count, samples, groups, -1)
            rows = (centred * inverse).reshape(count, samples, channels).sum(1)
            grads[1] = ctx.tape.record(ctx.weight, DenseFactor(rows))
        if wanted[2]:
            grads[2] = ctx.tape.record(ctx.bias, DenseFactor(shift.sum(1)))
        return (*grads, None, None, None, None, None)


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
    return host.run("layer_norm", _layer_norm, host, x, list(normalized_shape), *weights, eps)


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
    return host.run("rms_norm", _rms_norm, host, x, len(normalized_shape), *weights, eps)


def _mixed(input: Tensor, weight: Tensor | None) -> bool:
    """Return whether input and weight have two dtypes under autocast."""
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
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
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
    """Sum over all dims but the normalised ones, row by row. (M, *shape)."""
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
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad: Tensor = grad_outputs[0]
        # With u = x r: dw = Σ g u, and dx = r (w g − u mean(w g u)). Few memory passes.
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
