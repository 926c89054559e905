"""Cautious update rules: an entry moves only where the update agrees with the gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._shards import whole
from gradfilter._types import Kind, Transform
from gradfilter.transforms._transform import is_off, transform_in_context
from gradfilter.transforms._update_rules import Leaf, LeafRule, updates_of

SMALLEST_SHARE = 1e-3


@factory
def cautious(rule: Transform) -> Transform:
    """Leave out the entries of an update that point against the gradient.

    With the direction d of an update rule, p ← p − lr d, and the gradient g:

        φ = [d · g > 0];   p ← p − lr φ d / max(mean(φ), 0.001)

    The mean is over the entries of one leaf, so a leaf of which half the entries agree moves these
    twice as far. g has the sign of ``maximize`` and the L2 decay of the rule inside. Decoupled
    decay (`adamw`, `lion`, `muon`) is neither masked nor scaled, as in the paper. The momentum
    itself does not change. The mask is that of the final direction, Algorithm 1 of the paper, also
    with Nesterov's momentum and for `muon`, where the authors' code masks what it orthogonalises,
    by the sign of the momentum.

    For `adamw` the steps are those of the authors' code. Their C-Lion, their first C-AdamW and
    pytorch_optimizer divide by (n + 1)/N, for n of the N entries of a leaf that agree: a step
    shorter by n/(n + 1), much so for a small leaf.

    Without momentum, d and g agree everywhere, and nothing changes for `sgd`, `adam` or `rmsprop`.

    Args:
        rule: An update rule of this package, such as ``adamw(lr)``.

    Publishes: ``lr`` ().

    Cost: in addition to the rule, one mean per leaf and elementwise operations. No fused kernel.

    Raises:
        TypeError: ``rule`` is not an update rule of this package. What another transform adds as
            decay is not known, and would be masked.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.cautious(gf.sgd(1.0, momentum=0.9)), {"w": torch.zeros(2)}
        >>> state = update.init(params)
        >>> for grads in ([1.0, 1.0], [-0.1, 1.0]):  # the momentum is [1, 1], then [0.8, 1.9]
        ...     params, state, _ = update(params, state, {"w": torch.tensor(grads)})
        >>> params  # the second step is [0, -1.9], twice
        {'w': tensor([-1.0000, -4.8000])}

    References:
        Liang, Chen, Liu, Liu, "Cautious Optimizers: Improving Training with One Line of Code",
        2024, https://arxiv.org/abs/2411.16085
    """
    updates = updates_of("cautious", rule)
    inner: Any = updates.rule
    decay = getattr(inner, "decoupled_decay", 0.0)
    if not is_off(decay):
        inner = replace(inner, decoupled_decay=0.0)
    masked = replace(updates, name="cautious", rule=_Cautious(inner, decay))
    return transform_in_context(
        "cautious",
        Kind.TREE_TO_UPDATE,
        masked,
        init=rule.init,
        publishes=("lr",),
        row_rules=IGNORES_ROWS,
    )


@dataclass(frozen=True, eq=False)
class _Cautious:
    """A rule for one leaf without its decoupled decay, which is not masked, and that decay."""

    rule: LeafRule
    decoupled_decay: float

    @property
    def weight_decay(self) -> float:
        return self.rule.weight_decay

    @property
    def maximize(self) -> bool:
        return self.rule.maximize

    def without_decay(self) -> _Cautious:
        return _Cautious(self.rule.without_decay(), 0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return self.rule.buffers

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        update, own = self.rule.step(g, p, own, t, lr)
        update, decay = _masked(update, g), self.decoupled_decay
        return update if is_off(decay) else update - (lr * decay) * p, own

    @property
    def kernel(self) -> None:
        return None  # torch has none


def _masked(update: Tensor, g: Tensor) -> Tensor:
    """Return the entries that lead against the gradient, divided by their share."""
    # Signs, not a product, which could round to 0; what is not a number stays visible.
    opposed = torch.where(g > 0, update >= 0, update <= 0) | (g == 0)
    opposed = opposed & ~update.isnan()
    # A sum, because a mean over pieces of a sharded leaf is not that of all entries.
    kept = update.numel() - whole(opposed.sum())
    share = (kept.to(_tree.sum_dtype(update)) / update.numel()).clamp(min=SMALLEST_SHARE)
    return torch.where(opposed, 0.0, update / share)
