"""The derivative of a batched forward pass as two linear maps: J v and Jᵀ u."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfilter.diagnostics._input_checks import Model, check_logits, check_model, check_samples

# --- Attention with derivatives of all orders ---


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention by matrix products inside the context.

    The fused kernels have no vmapped backward pass, no forward mode and no second derivative, and
    those of complete layers in evaluation mode have no derivative at all.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- Recurrent layers with derivatives of all orders ---


@contextmanager
def plain_recurrence(model: Callable[..., Any], device: torch.device) -> Iterator[None]:
    """Run the recurrent layers of a module step by step inside the context.

    On a CPU the fused LSTM keeps no workspace if parameters need no gradient, and then has no
    backward pass. On a GPU fused layers have none in evaluation mode.
    """
    fused = nn.LSTM if device.type == "cpu" else nn.RNNBase
    layers = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(layer, fused) for layer in layers):
        yield
        return
    # torch's flags() would also reset all other flags to their defaults.
    # Any, because torch's stubs omit `enabled`.
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cudnn
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


# --- Cross-entropy with derivatives that stay accurate for confident models ---


def log_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the sum over samples of −log p_y = (z_t − z_y) + log(1 + Σ_{k≠t} e^(z_k − z_t)).

    t is the top class. The second derivative of −log softmax contains 1 − p_t as a difference that
    rounds to 0. Here every small number is an exponential, at any order.

    Args:
        logits: z, (N, C), in the dtype to compute in.
        targets: y, (N,), int64.

    Returns:
        ().
    """
    top = logits.argmax(1, keepdim=True)
    gaps = logits - logits.gather(1, top)
    others = gaps.exp().scatter(1, top, 0.0).sum(1)
    return (others.log1p() - gaps.gather(1, targets[:, None])[:, 0]).sum()


# --- The two linear maps ---


@dataclass(frozen=True, eq=False)
class Derivative:
    """J = ∂logits/∂x of every sample, at one batch.

    Attributes:
        x: The point (N, *shape) of the derivative.
        logits: (N, C).
        push: J v for v (N, *shape): a forward pass with tangents. (N, C).
        pull: Jᵀ u for several u at once, (c, N, C) of any dtype, through the one forward
            pass. (c, N, *shape). No gradient of a parameter is computed.
    """

    x: Tensor
    logits: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


@torch.no_grad()  # no graph of the parameters; torch.func has its own grad mode
def derivative(model: Model, x: Tensor) -> Derivative:
    """Run the model once and keep the graph for the linear maps."""
    check_model(model)
    check_samples(x)
    if x.ndim == 4 and x.device.type == "cpu":
        # oneDNN otherwise reorders every image before and after every convolution: 1.3 to 1.5
        # times slower. A model that calls .view() on them needs the usual order.
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
            # torch's own imports for forward mode raise deprecation warnings.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            moved: Tensor = torch.func.jvp(model, (x,), (tangents,))[1]
        return moved

    @torch.no_grad()
    def pull(u: Tensor) -> Tensor:
        u = u.to(logits.dtype)
        if len(u) == 1:  # operations that vmap refuses still work one by one
            one: Tensor = vjp(u[0])[0]
            return one[None]
        many: Tensor = torch.func.vmap(vjp)(u)[0]
        return many

    return Derivative(x, logits, push, pull)


def _dense(x: Tensor) -> Tensor:
    """Return a copy in which each number has its own memory, as tangents need it."""
    dense = torch.empty_like(x)
    return x if dense.stride() == x.stride() else dense.copy_(x)
