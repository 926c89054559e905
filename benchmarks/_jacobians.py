"""Common ways to compute the input Jacobians of a batch, for comparison with gradfilter."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Way = Callable[[nn.Module, Tensor], Tensor]  # (N, C, *shape)


def loop_published(model: nn.Module, x: Tensor) -> Tensor:
    """Run a backward pass per class, as published; it also sums gradients of the weights."""
    x = x.detach().clone().requires_grad_()
    logits, rows = model(x), []
    for number in range(logits.shape[1]):
        x.grad = None
        logits[:, number].sum().backward(retain_graph=True)
        rows.append(x.grad)
    for parameter in model.parameters():
        parameter.grad = None
    return torch.stack(rows, 1)


def loop_inputs_only(model: nn.Module, x: Tensor) -> Tensor:
    """Run the same loop without gradients of the weights."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    rows = [
        torch.autograd.grad(logits[:, number].sum(), x, retain_graph=True)[0]
        for number in range(logits.shape[1])
    ]
    return torch.stack(rows, 1)


def jacrev(model: nn.Module, x: Tensor) -> Tensor:
    """Compute `torch.func.jacrev` with vmap over the samples, without gradients of the weights."""
    one = torch.func.jacrev(lambda sample: model(sample[None])[0])
    with torch.no_grad():
        return torch.func.vmap(one)(x)


WAYS: dict[str, Way] = {
    "loop, as published": loop_published,
    "loop, inputs only": loop_inputs_only,
    "vmap(jacrev)": jacrev,
}


def frobenius(jacobian: Tensor) -> Tensor:
    """Compute the norm of the Jacobian of each sample. (N,)."""
    return jacobian.flatten(1).norm(dim=1)


def spectral(jacobian: Tensor) -> Tensor:
    """Compute the largest singular value for each sample, from the small C x C Gram. (N,)."""
    rows = jacobian.flatten(2)
    return torch.linalg.eigvalsh(rows @ rows.mT)[:, -1].sqrt()
