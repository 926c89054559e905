"""SGD and RMSprop, with exactly the semantics and keywords of torch.optim."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter._made import remembered
from gradfilter._types import Transform
from gradfilter.transforms._kernel import WIDE, Leaves
from gradfilter.transforms._link import check_number, is_off
from gradfilter.transforms._rule import update_rule
from gradfilter.transforms._schedule import Schedule

Leaf = dict[str, Tensor]
Lists = dict[str, Leaves]


@remembered
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
        lr: At least 0, or a Schedule.
        momentum: μ >= 0.
        dampening: Usually 0.
        weight_decay: λ >= 0, L2.
        nesterov: Needs momentum > 0 and dampening = 0.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; nesterov without momentum or with dampening.

    Examples:
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
            b = momentum * own["momentum"]
            # Without dampening the first buffer is the gradient, because it starts from zeros.
            b = b + g if is_off(dampening) else torch.where(t == 1, g, b + (1 - dampening) * g)
            own = {"momentum": b}
            g = g + momentum * b if nesterov else b
        return -lr * g, own

    def kernel(
        p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        torch._fused_sgd_(
            p,
            g,
            own.get("momentum", []),
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=False,  # from a buffer of zeros the first one comes out right
            found_inf=skip,
        )

    plain = is_off(dampening) and not any(isinstance(h, Tensor) for h in (momentum, weight_decay))
    return update_rule(
        "sgd",
        lr,
        buffers,
        step,
        weight_decay=weight_decay,
        maximize=maximize,
        kernel=kernel if plain else None,
        # To torch 2.13 the CPU kernel skips most of half precision: pytorch/pytorch issue 191763.
        cpu_dtypes=WIDE,
    )


@remembered
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
        lr: At least 0, or a Schedule.
        alpha: In [0, 1]; v starts from 0 without bias correction.
        eps: Outside the root.
        weight_decay: λ >= 0, L2.
        momentum: μ >= 0.
        centered: Normalise by the variance.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
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
