"""GroupNorm and InstanceNorm: all rows in one kernel, gains and shifts summed row by row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._dense_factor import DenseFactor
from gradfilter.grads._lift import autocast_dtype
from gradfilter.grads._rules._batch_norm import batch_norm, own_affine
from gradfilter.grads._rules._host import Host, owned, rows_of
from gradfilter.grads._tape import Tape, Weight


def group_norm(
    host: Host,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """`torch.nn.functional.group_norm`."""
    weights = host.weights(weight, bias)
    if weights is None or not host.batched(input, weight, bias) or input.ndim < 2:
        return NotImplemented
    mixed = weight is not None and input.dtype != weight.dtype and autocast_dtype(input.device)
    if not host.batched(weight, bias) and not mixed:
        return NotImplemented
    if autocast_dtype(input.device) and input.device.type != "cpu":
        return NotImplemented  # there it computes in float32
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
    """`torch.nn.functional.instance_norm`: with its own statistics, a group norm of one channel."""
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
    rule: str,
    x: Tensor,
    groups: int,
    weight: Weight | None,
    bias: Weight | None,
    eps: float,
) -> Tensor:
    host.used(rule, weight, x.numel())
    host.used(rule, bias, x.numel())
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
        return owned(y.view(x.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
        # Σ over positions first: two numbers per sample and channel carry all that is wanted.
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
