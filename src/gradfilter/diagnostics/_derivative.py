"""The derivative of a batched forward pass, as two linear maps: with it, and against it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter.diagnostics._attention import plain_attention
from gradfilter.diagnostics._checks import Model, check_logits, check_model, check_samples
from gradfilter.diagnostics._recurrent import plain_recurrence


@dataclass(frozen=True, eq=False)
class Derivative:
    """J = ∂logits/∂x of every sample, at one batch.

    Attributes:
        x: (N, *shape), where it was taken.
        logits: (N, C).
        push: J v for v (N, *shape): a forward pass with tangents. (N, C).
        pull: Jᵀ u for several u at once, (c, N, C) of any dtype, through the one forward pass
            there was. (c, N, *shape). No gradient of a parameter is computed on the way.
    """

    x: Tensor
    logits: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


@torch.no_grad()  # the parameters' graph; torch.func has a grad mode of its own
def derivative(model: Model, x: Tensor) -> Derivative:
    """Run the model once and keep what the linear maps need."""
    check_model(model)
    check_samples(x)
    if x.ndim == 4 and x.device.type == "cpu":
        # oneDNN otherwise reorders every image before and after every convolution: 1.3 to 1.5
        # times slower. A model that calls .view() on them wants the usual order.
        with suppress(RuntimeError):
            return _at(model, x.contiguous(memory_format=torch.channels_last))
    return _at(model, x)


def _at(model: Model, x: Tensor) -> Derivative:
    x = _dense(x.detach())
    with plain_attention(), plain_recurrence(model, x.device):
        logits, vjp, *_ = torch.func.vjp(model, x)
    check_logits(logits, len(x))

    @torch.no_grad()
    def push(v: Tensor) -> Tensor:
        tangents = torch.empty_like(x).copy_(v.reshape(x.shape))  # in the layout of x
        with (
            warnings.catch_warnings(),
            plain_attention(),
            plain_recurrence(model, x.device),
        ):
            # What torch imports for forward mode uses what torch has deprecated.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            moved: Tensor = torch.func.jvp(model, (x,), (tangents,))[1]
        return moved

    @torch.no_grad()
    def pull(u: Tensor) -> Tensor:
        u = u.to(logits.dtype)
        if len(u) == 1:  # what cannot be vmapped can still be had one by one
            one: Tensor = vjp(u[0])[0]
            return one[None]
        many: Tensor = torch.func.vmap(vjp)(u)[0]
        return many

    return Derivative(x, logits, push, pull)


def _dense(x: Tensor) -> Tensor:
    """The same numbers, each with memory of its own, as tangents must be laid out."""
    dense = torch.empty_like(x)
    return x if dense.stride() == x.stride() else dense.copy_(x)
