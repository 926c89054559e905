"""A small regression problem in float64, also as flat vectors, for the sharpness tests."""

import torch

import gradfilter as gf
from _naive import flat, normal, unflat

M, B = 4, 3
SHAPES = {"hidden.weight": (5, 3), "hidden.bias": (5,), "out": (5,), "unused": (2,)}
USED = 25


def loss(params, batch):
    x, y = batch
    hidden = torch.tanh(x @ params["hidden.weight"].T + params["hidden.bias"])
    return (hidden @ params["out"] - y).square().mean()


def make_params(seed=0):
    return unflat(0.7 * normal(USED + 2, seed=seed), SHAPES)


def make_batch(seed=1, bad=()):
    """Make microbatches with very different gradients; those in ``bad`` give NaN."""
    x, y = normal(M, B, 3, seed=seed), normal(M, B, seed=seed + 1)
    y = y * torch.arange(1, M + 1, dtype=y.dtype)[:, None] ** 2
    for m in bad:
        x[m, 0, 0] = torch.nan
    return x.reshape(M * B, 3), y.reshape(M * B)


def make_rows(params, batch):
    return gf.microbatch_grads(loss, M, plan="loop")(params, batch)


def row(w, batch, m):
    """Return loss and gradient of microbatch m at the flat parameters w."""
    w = w.clone().requires_grad_()
    value = loss(unflat(w, SHAPES), tuple(t[m * B : (m + 1) * B] for t in batch))
    return value.item(), torch.autograd.grad(value, w)[0]


def rows_at(w, batch):
    """Return losses (M,) and gradients (M, P) at the flat parameters w."""
    losses, grads = zip(*(row(w, batch, m) for m in range(M)), strict=True)
    return torch.tensor(losses, dtype=w.dtype), torch.stack(grads)


def ascent(w, g, rho, adaptive=None, eta=0.01):
    """Return e of SAM, of ASAM or of GSAM's adaptive form, on flat vectors."""
    if adaptive == "asam":
        t = w.abs() + eta
        return rho * t**2 * g / ((t * g).norm() + 1e-12)
    return rho * (w.abs() if adaptive else 1) * g / (g.norm() + 1e-12)


def problem(seed=0, bad=()):
    """Return parameters, batch and stack, and flat: parameters, losses, gradients."""
    params, batch = make_params(seed), make_batch(seed + 1, bad)
    w = flat(params)
    return params, batch, make_rows(params, batch), w, *rows_at(w, batch)
