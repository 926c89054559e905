"""Linear layers: one product over all rows, weight gradients kept as what they are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._autocast import under_autocast
from gradfilter.grads._dense_factor import DenseFactor
from gradfilter.grads._factor import OuterFactor, ghost_flops
from gradfilter.grads._rules._host import Host, in_autocast, owned, rows_of
from gradfilter.grads._tape import Tape, Weight


def linear(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`torch.nn.functional.linear` for inputs of any rank."""
    weights = host.weights(weight, bias)
    if weights is None or not host.wanted(x, weight, bias) or weight.ndim != 2:
        return NotImplemented
    return host.run("linear", _apply, host, host.level.lower(x), *weights)


def linear_or_vmap(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The rule where it applies, else what vmap makes of it."""
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
        return owned(F.linear(x, weight.value, None if bias is None else bias.value))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
