"""Schedule-free training: gradients between an average of the parameters and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._types import Context, Kind, Out, Params, State, Transform, Tree
from gradfilter.transforms._evaluated import AHEAD, new_number, refuse_followers
from gradfilter.transforms._transform import check_number, is_off, transform_in_context
from gradfilter.transforms._update_rules import LeafRule, new_count, updates_of


@factory
def schedule_free(
    rule: Transform, *, beta: float = 0.9, r: float = 0.0, weight_lr_power: float = 2.0
) -> Transform:
    """Train without a schedule that has an end: average the parameters of an update rule.

    With the gradient g at y, the update rule's change u(g, y), and x = y = z at the start:

        z ← z + u(g, y);   x ← (1 − c) x + c z;   y ← β x + (1 − β) z

    c = w / Σ w over all steps so far, with w = k^r · (the largest lr so far)^p in step k = 1, 2, …
    and p = ``weight_lr_power``. The parameters of the training are y. Those to evaluate and to save
    are x: `evaluated_params`. With a constant lr and r = 0, x is the mean of all z; during a
    warm-up steps with a small lr count less.

    β has the role of the momentum, so the rule has none: ``sgd(lr)``, ``adamw(lr, betas=(0,
    0.999))``. Weight decay acts at y. The lr should warm up and then stay constant.

    Args:
        rule: An update rule of this package without momentum.
        beta: The share β of the average in y, in [0, 1]. 0.9 is usual; 0 takes gradients at z, and
            1 at x.
        r: Exponent r >= 0 of the step in the weights. Above 0, later steps count more.
        weight_lr_power: Exponent p >= 0 of the lr in the weights; 0 weighs all steps alike.

    Publishes: ``lr`` (), and ``share`` (), the number c.

    Cost: in addition to the rule, one buffer z − x in float32 or wider, and elementwise operations.

    Raises:
        TypeError: ``rule`` is not an update rule of this package.
        ValueError: A number out of range; a rule with momentum; at ``init``, a transform of updates
            behind it in the chain.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.schedule_free(gf.sgd(1.0), beta=0.5), {"w": torch.zeros(1)}
        >>> state = update.init(params)
        >>> for _ in range(2):  # z is -1 and then -2, x is -1 and then -1.5
        ...     params, state, _ = update(params, state, {"w": torch.ones(1)})
        >>> params, gf.evaluated_params(params, state)
        ({'w': tensor([-1.7500])}, {'w': tensor([-1.5000])})

    References:
        Defazio et al., "The Road Less Scheduled", 2024, https://arxiv.org/abs/2405.15682
    """
    check_number("schedule_free", "beta", beta, low=0, high=1, fix="0.9 is usual.")
    check_number("schedule_free", "r", r, low=0, fix="0 weighs all steps alike.")
    fix = "2 is usual, 0 weighs all steps alike."
    check_number("schedule_free", "weight_lr_power", weight_lr_power, low=0, fix=fix)
    if _remembers(updates_of("schedule_free", rule).rule):
        raise ValueError(
            f"schedule_free: expected an update rule without momentum, found {rule!r}. beta has "
            "its role: write sgd(lr), adamw(lr, betas=(0, 0.999)) or muon(lr, momentum=0)."
        )
    averaged = _ScheduleFree(rule, beta, r, weight_lr_power)
    return transform_in_context(
        "schedule_free",
        Kind.TREE_TO_UPDATE,
        averaged.compute,
        init=averaged.init,
        publishes=("lr", "share"),
        row_rules=IGNORES_ROWS,
    )


def _remembers(rule: LeafRule) -> bool:
    """Return whether a rule, or the one that it wraps, has momentum."""
    inner = getattr(rule, "rule", rule)
    return "momentum" in rule.buffers or not is_off(getattr(inner, "beta1", 0.0))


@dataclass(frozen=True, eq=False)
class _ScheduleFree:
    """An update rule whose parameters are averaged.

    Only y, which are the parameters, and the offset o = z − x are kept: x = y − (1 − β) o. So x
    follows the parameters, whatever else changes them between two steps.
    """

    rule: Transform
    beta: float | Tensor
    r: float | Tensor
    power: float | Tensor

    def init(self, params: Params) -> State:
        refuse_followers("schedule_free")
        return {
            "rule": self.rule.init(params),
            "offset": {n: torch.zeros_like(_tree.at_least_float32(p)) for n, p in params.items()},
            "count": new_count(params),
            "largest_lr": new_number(0.0, params),
            "total": new_number(0.0, params),
            AHEAD: {"offset": new_number(1 - self.beta, params)},
        }

    def compute(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        changes, inner, out = self.rule.compute(grads, state["rule"], params, context)
        count = state["count"] + 1
        largest = torch.maximum(state["largest_lr"], out["lr"].to(state["largest_lr"].dtype))
        weight = count.to(largest.dtype) ** self.r * largest**self.power
        total = state["total"] + weight
        share = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        old, new = state[AHEAD]["offset"], new_number(1 - self.beta, params)
        updates: Tree = {}
        offsets: Tree = {}
        for name, offset in state["offset"].items():
            ahead = offset + changes[name]  # of x, before the average follows
            offsets[name] = (1 - share) * ahead
            updates[name] = (share + new * (1 - share)) * ahead - old * offset
        new_state = {
            "rule": inner,
            "offset": offsets,
            "count": count,
            "largest_lr": largest,
            "total": total,
            AHEAD: {"offset": new},
        }
        return updates, new_state, {"lr": out["lr"], "share": share}
