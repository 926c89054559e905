"""BatchNorm: every microbatch by its own statistics, running statistics updated in order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._dense_factor import DenseFactor
from gradfilter.grads._lift import shared
from gradfilter.grads._one_image import straight
from gradfilter.grads._rules._host import Host, owned, rows_of
from gradfilter.grads._tape import Tape, Weight


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
    """`torch.nn.functional.batch_norm`."""
    if not host.level.batched(input) or input.ndim < 2 or host.batched(running_mean, running_var):
        return NotImplemented
    x = host.level.lower(input)
    if shared(x):
        return NotImplemented  # weight standardisation: the input is a weight
    if training and input.numel() == input.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    weights = host.weights(weight, bias)
    if weights is None:
        args = (running_mean, running_var, None, None, training, momentum, eps)
        y = batch_norm(host, input, *args)
        if y is NotImplemented:  # nothing of a row but its input: vmap's own rule will do
            host.running.read(running_mean, running_var)
            y = F.batch_norm(input, *args)
        return own_affine(y, weight, bias)
    if not training:
        if running_mean is None or running_var is None:
            return NotImplemented
        # vmap mixes no dtypes.
        if not host.batched(weight, bias) and input.dtype == running_mean.dtype:
            return NotImplemented
        host.running.read(running_mean, running_var)
        return host.run("batch_norm", _evaluate, host, x, running_mean, running_var, *weights, eps)
    update = host.running.start(running_mean, running_var, momentum, x)
    return host.run("batch_norm", _train, host, x, update, *weights, eps)


def own_affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gains and shifts that every row has of its own, in the dtype of what they are applied to."""
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
        wide = x.dtype in (torch.float32, torch.float64)  # else statistics in torch's own choice
        if x.ndim == 5 and wide and _is_plain(x[0]):
            means, inverses = x.new_empty(2, len(x), x.shape[2])
            y = torch.empty_like(x)
            for m in range(len(x)):
                out, (mean, var, rate) = (y[m], means[m], inverses[m]), update(m)
                torch.native_batch_norm(x[m], w, b, mean, var, True, rate, eps, out=out)
        else:  # what is written into a given output is laid out, and rounded, in another way
            found = [
                torch.native_batch_norm(x[m], w, b, mean, var, True, rate, eps)
                for m, (mean, var, rate) in enumerate(map(update, range(len(x))))
            ]
            y, means, inverses = map(torch.stack, zip(*found, strict=True))
        ctx.save_for_backward(x, means, inverses)
        ctx.weight, ctx.bias, ctx.eps, ctx.tape = weight, bias, eps, tape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
        return owned(flat.view(x.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
    """Whether a row is contiguous, in either memory format."""
    channels_last = row.ndim == 4 and row.is_contiguous(memory_format=torch.channels_last)
    return row.is_contiguous() or channels_last
