"""Lion: the sign of an interpolated momentum, with decoupled decay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradfilter._factory import factory
from gradfilter._types import Transform
from gradfilter.schedules._schedules import Schedule
from gradfilter.transforms._transform import check_number, is_off
from gradfilter.transforms._update_rules import Decay, Leaf, check_decays, update_rule


@factory
def lion(
    lr: float | Schedule = 1e-4,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decays: Decay | None = None,
    maximize: bool = False,
) -> Transform:
    """Apply Lion: all entries move by the learning rate, in the direction of a momentum.

    g ← ±g;  u = sign(β1 m + (1 − β1) g);  p ← p − lr (u + λ p);  m ← β2 m + (1 − β2) g, with m = 0
    at the start. An entry that is not a number stays one, although the sign of NaN is 0 in torch.

    Args:
        lr: The learning rate, at least 0, or a Schedule. The paper takes a third to a tenth of that
            of AdamW, with a decay that is larger by the same factor.
        betas: (β1, β2), each in [0, 1).
        weight_decay: The decoupled factor λ >= 0.
        decays: A predicate on names: the leaves that decay, of which there must be one; None for
            all.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Cost: one buffer of the size of the parameters, and elementwise operations; no fused kernel.

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.lion(0.1), {"w": torch.ones(2)}
        >>> update(params, update.init(params), {"w": torch.tensor([5.0, -0.01])})[0]
        {'w': tensor([0.9000, 1.1000])}

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
        https://arxiv.org/abs/2302.06675
    """
    beta1, beta2 = betas
    for beta in betas:
        argument = "betas" if isinstance(beta, Schedule) else "beta"
        fix = "(0.9, 0.99) is usual."
        check_number("lion", argument, beta, low=0, high=1, open_high=True, fix=fix)
    check_number("lion", "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    check_decays("lion", weight_decay, decays)
    return update_rule("lion", lr, _Lion(beta1, beta2, maximize, weight_decay), decays)


@dataclass(frozen=True, eq=False)
class _Lion:
    """Lion, with its numbers."""

    beta1: float
    beta2: float
    maximize: bool
    decoupled_decay: float
    weight_decay: float = 0.0

    def without_decay(self) -> _Lion:
        return replace(self, decoupled_decay=0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("m",)

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        between = self.beta1 * own["m"] + (1 - self.beta1) * g
        direction = torch.where(between.isnan(), between, between.sign())
        decay = self.decoupled_decay
        move = direction if is_off(decay) else direction + decay * p
        return -lr * move, {"m": self.beta2 * own["m"] + (1 - self.beta2) * g}

    @property
    def kernel(self) -> None:
        return None  # torch has none
