"""Update rules with exactly the semantics and keywords of torch.optim."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter._types import Transform
from gradfilter.transforms._link import check_number, is_off
from gradfilter.transforms._rule import update_rule
from gradfilter.transforms._schedule import Schedule

Leaf = dict[str, Tensor]


def sgd(
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Transform:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    g ← ±g + λ p;  b ← μ b + (1 − dampening) g, the first b being g itself;  p ← p − lr · b
    (Nesterov: p − lr (g + μ b)). The lr is applied at the end and is in no buffer.

    Args:
        lr: >= 0, or a Schedule.
        momentum: μ >= 0.
        dampening: Usually 0.
        weight_decay: λ >= 0, L2.
        nesterov: Needs momentum > 0 and dampening = 0.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; nesterov without momentum or with dampening.

    Example:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.sgd(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}
    """
    check_number("sgd", "momentum", momentum, low=0, fix="0.9 is usual.")
    if nesterov and (is_off(momentum) or not is_off(dampening)):
        raise ValueError(
            "sgd: expected momentum > 0 and dampening = 0 with nesterov, found "
            f"momentum={momentum}, dampening={dampening}."
        )
    buffers = () if is_off(momentum) else ("momentum",)

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        if buffers:
            b = torch.where(t == 1, g, momentum * own["momentum"] + (1 - dampening) * g)
            own = {"momentum": b}
            g = g + momentum * b if nesterov else b
        return -lr * g, own

    return update_rule("sgd", lr, buffers, step, weight_decay=weight_decay, maximize=maximize)


def adam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with L2 decay, as `torch.optim.Adam`.

    g ← ±g + λ p;  m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;
    p ← p − lr / (1 − β1^t) · m / (√v / √(1 − β2^t) + eps). AMSGrad takes the largest v so far.

    Args:
        lr: >= 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Outside the root, after bias correction.
        weight_decay: λ >= 0, L2.
        amsgrad: Use the maximum of the raw v.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Example:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adam(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Kingma, Ba, "Adam", 2015, https://arxiv.org/abs/1412.6980
    """
    return _adam("adam", lr, betas, eps, amsgrad, maximize, l2=weight_decay, decoupled=0.0)


def adamw(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with decoupled decay, as `torch.optim.AdamW`: p ← (1 − lr λ) p, then Adam without L2.

    Args:
        lr: >= 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Outside the root, after bias correction.
        weight_decay: λ >= 0, decoupled.
        amsgrad: Use the maximum of the raw v.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Example:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adamw(0.1, weight_decay=1.0), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.8000])}

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019,
        https://arxiv.org/abs/1711.05101
    """
    check_number("adamw", "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    return _adam("adamw", lr, betas, eps, amsgrad, maximize, l2=0.0, decoupled=weight_decay)


def _adam(
    name: str,
    lr: float | Schedule,
    betas: tuple[float, float],
    eps: float,
    amsgrad: bool,
    maximize: bool,
    *,
    l2: float,
    decoupled: float,
) -> Transform:
    beta1, beta2 = betas
    for beta in betas:
        check_number(
            name, "beta", beta, low=0, high=1, open_high=True, fix="(0.9, 0.999) is usual."
        )
    check_number(name, "eps", eps, low=0, fix="1e-8 is usual.")
    buffers = ("m", "v", "max_v") if amsgrad else ("m", "v")

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        m = beta1 * own["m"] + (1 - beta1) * g
        v = beta2 * own["v"] + (1 - beta2) * g.square()
        new = {"m": m, "v": v}
        if amsgrad:
            v = new["max_v"] = torch.maximum(own["max_v"], v)
        # The corrections are 0-d and wide, so that 1 − β2^t does not cancel in half precision.
        steps = t.to(lr.dtype)
        denominator = v.sqrt() / (1 - beta2**steps).sqrt() + eps
        update = -(lr / (1 - beta1**steps)) * (m / denominator)
        return update if is_off(decoupled) else update - (lr * decoupled) * p, new

    return update_rule(name, lr, buffers, step, weight_decay=l2, maximize=maximize)


def rmsprop(
    lr: float | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Transform:
    """RMSprop, as `torch.optim.RMSprop`.

    g ← ±g + λ p;  v ← α v + (1 − α) g²;  s = √v + eps, centered: √(v − ḡ²) + eps with
    ḡ ← α ḡ + (1 − α) g;  p ← p − lr g/s, with momentum b ← μ b + g/s and p ← p − lr b.

    Args:
        lr: >= 0, or a Schedule.
        alpha: In [0, 1]; v starts from 0 without bias correction.
        eps: Outside the root.
        weight_decay: λ >= 0, L2.
        momentum: μ >= 0.
        centered: Normalise by the variance.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Example:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.rmsprop(0.1, alpha=0.0), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Tieleman, Hinton, "Lecture 6.5 — RMSprop", 2012; Graves, 2013,
        https://arxiv.org/abs/1308.0850
    """
    check_number("rmsprop", "alpha", alpha, low=0, high=1, fix="0.99 is usual.")
    check_number("rmsprop", "eps", eps, low=0, fix="1e-8 is usual.")
    check_number("rmsprop", "momentum", momentum, low=0, fix="0 switches it off.")
    buffers = ("v",) + ("mean",) * centered + ("momentum",) * (not is_off(momentum))

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        new = {"v": alpha * own["v"] + (1 - alpha) * g.square()}
        variance = new["v"]
        if centered:
            new["mean"] = alpha * own["mean"] + (1 - alpha) * g
            variance = variance - new["mean"].square()
        direction = g / (variance.sqrt() + eps)
        if "momentum" in buffers:
            new["momentum"] = direction = momentum * own["momentum"] + direction
        return -lr * direction, new

    return update_rule("rmsprop", lr, buffers, step, weight_decay=weight_decay, maximize=maximize)
