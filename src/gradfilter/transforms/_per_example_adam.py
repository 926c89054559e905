"""Adam with the mean of the squared gradients of single rows as its second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack, as_stack
from gradfilter.schedules._schedules import Schedule, as_schedule
from gradfilter.transforms._reducers import mean_weights
from gradfilter.transforms._transform import (
    check_leaves,
    check_number,
    is_off,
    transform_in_context,
)
from gradfilter.transforms._update_rules import new_count, schedule_value


@factory
def per_example_adam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Apply Adam, whose second moment is the mean of the squared rows, not the squared mean.

    With rows g_1 .. g_M that the weights w_m combine to g:

    m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) Σ_j |w_j| · Σ_m |w_m| g_m²;
    p ← (1 − lr λ) p − lr / (1 − β1^t) · m / (√v / √(1 − β2^t) + eps).

    Reducers give weights with the sum 1, so the second moment is the weighted mean of g_m². Per
    coordinate it is g² plus the variance of the rows, where Adam sees g² and about 1/M of that
    variance. With one row, or equal rows, it is `adamw`. Steps are smaller where rows disagree, so
    a learning rate of Adam does not carry over.

    The paper finds it worse than Adam: its language models train best if the second moment is
    dominated by the square of the mean.

    On rows it takes their mean itself: ``chain(clip_per_row(1.0), per_example_adam(1e-3))``. Behind
    a reducer it takes the rows that the reducer got, with its weights; transforms in between change
    g alone. A row that is not finite makes both moments so, unless finite_filter removed it.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Added outside the root, after bias correction.
        weight_decay: The decoupled factor λ >= 0.

    Needs: rows, or ``rows`` and ``weights`` of a reducer. Publishes: ``lr`` ().

    Cost: one `GradStack.sum_squares` in addition to Adam, before the combination of the rows. For
    linear layers with one position per row this is one more product; other layers compute their
    rows in tiles. Behind a reducer that asks for a combination alone (`mean_rows`) it takes another
    pass. The second moment is held in float32 or wider.

    Raises:
        ValueError: A number out of range; at a step, there are neither rows nor weights.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.per_example_adam(0.1), {"w": torch.zeros(2)}
        >>> rows = gf.DenseStack({"w": torch.tensor([[1.0, 3.0], [1.0, -1.0]])})
        >>> update(params, update.init(params), rows)[0]  # the mean is (1, 1)
        {'w': tensor([-0.1000, -0.0447])}

    References:
        Roulet, Agarwala, "Per-example gradients: a new frontier for understanding and improving
        optimizers", 2025, https://arxiv.org/abs/2510.00236
    """
    beta1, beta2 = betas
    if not isinstance(lr, Schedule):
        check_number(
            "per_example_adam", "lr", lr, low=0, fix="A Schedule such as cosine(...) also fits."
        )
    for beta in betas:
        argument = "betas" if isinstance(beta, Schedule) else "beta"
        fix = "(0.9, 0.999) is usual."
        check_number("per_example_adam", argument, beta, low=0, high=1, open_high=True, fix=fix)
    check_number("per_example_adam", "eps", eps, low=0, fix="1e-8 is usual.")
    check_number("per_example_adam", "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    rule = _PerExampleAdam(as_schedule(lr), beta1, beta2, eps, weight_decay)
    return transform_in_context(
        "per_example_adam",
        ("rows -> update", "tree -> update"),
        rule.compute,
        init=rule.init,
        publishes=("lr",),
    )


@dataclass(frozen=True, eq=False)
class _PerExampleAdam:
    """The rule with its hyperparameters. Its state: ``m``, ``v``, ``count`` and ``lr``."""

    schedule: Schedule
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    decay: float | Tensor

    def init(self, params: Params) -> State:
        """Return moments of zeros, the count 0, and the state of the schedule."""
        count = new_count(params)
        return {
            "m": _tree.zeros_like(params),
            "v": {name: torch.zeros_like(_tree.at_least_float32(p)) for name, p in params.items()},
            "count": count,
            "lr": self.schedule.init(count),
        }

    def compute(
        self, grads: GradStack | Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        """Return the updates."""
        for moment in ("m", "v"):
            check_leaves(f"per_example_adam: state {moment!r}", state[moment], params)
        grads, squares = self._moments(grads, context)
        value, lr_state = schedule_value(self.schedule, state["count"], state["lr"], context)
        t = state["count"] + 1
        steps = t.to(value.dtype)
        rate, root = value / (1 - self.beta1**steps), (1 - self.beta2**steps).sqrt()
        updates: Tree = {}
        first: Tree = {}
        second: Tree = {}
        for name, g in grads.items():
            m = self.beta1 * state["m"][name] + (1 - self.beta1) * g
            v = self.beta2 * state["v"][name] + (1 - self.beta2) * squares[name]
            first[name], second[name] = m.to(g.dtype), v.to(state["v"][name].dtype)
            update = -rate * (m / (v.sqrt() / root + self.eps))
            if not is_off(self.decay):
                update = update - (value * self.decay) * params[name]
            updates[name] = update.to(params[name].dtype)
        return updates, {"m": first, "v": second, "count": t, "lr": lr_state}, {"lr": value}

    def _moments(self, grads: GradStack | Tree, context: Context) -> tuple[Tree, Tree]:
        """Return the gradient, and the weighted mean of the squared rows."""
        if isinstance(grads, GradStack):
            weights = mean_weights(grads)
            # The squares first: after a combination alone they would take another pass.
            squares = grads.sum_squares(weights)
            return grads.combine(weights), squares
        if context.rows is None or context.weights is None:
            raise ValueError(
                "per_example_adam: expected rows, or a gradient with the rows and weights that "
                "made it, found a gradient alone. Put it behind a reducer or a transform of rows "
                "in one chain."
            )
        weights = context.weights.abs()
        squares = as_stack(context.rows).sum_squares(weights)
        total = weights.sum()
        return grads, {name: leaf * total.to(leaf.dtype) for name, leaf in squares.items()}
