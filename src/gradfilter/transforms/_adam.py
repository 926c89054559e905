"""Adam and AdamW, with exactly the semantics and keywords of torch.optim."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter._made import remembered
from gradfilter._types import Transform
from gradfilter.transforms._kernel import Leaves
from gradfilter.transforms._link import check_number, is_off
from gradfilter.transforms._rule import update_rule
from gradfilter.transforms._schedule import Schedule

Leaf = dict[str, Tensor]
Lists = dict[str, Leaves]


@remembered
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
        lr: At least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Outside the root, after bias correction.
        weight_decay: λ >= 0, L2.
        amsgrad: Use the maximum of the raw v.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adam(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Kingma, Ba, "Adam", 2015, https://arxiv.org/abs/1412.6980
    """
    return _adam("adam", lr, betas, eps, amsgrad, maximize, l2=weight_decay, decoupled=0.0)


@remembered
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
        lr: At least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Outside the root, after bias correction.
        weight_decay: λ >= 0, decoupled.
        amsgrad: Use the maximum of the raw v.
        maximize: Ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
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
        argument = "betas" if isinstance(beta, Schedule) else "beta"
        fix = "(0.9, 0.999) is usual."
        check_number(name, argument, beta, low=0, high=1, open_high=True, fix=fix)
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

    def kernel(
        p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        fused = torch._fused_adam_ if is_off(decoupled) else torch._fused_adamw_
        fused(
            p,
            g,
            own["m"],
            own["v"],
            own.get("max_v", []),
            [t] * len(p),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=l2 if is_off(decoupled) else decoupled,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            found_inf=skip,
        )

    plain = not any(isinstance(h, Tensor) for h in (beta1, beta2, eps, l2, decoupled))
    return update_rule(
        name,
        lr,
        buffers,
        step,
        weight_decay=l2,
        maximize=maximize,
        kernel=kernel if plain else None,
    )
