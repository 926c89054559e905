"""Budget clipping: the rows of a batch share a limited sum of norms, by how they agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._consensus import cosines_with_others
from gradfilter.transforms._link import check_number, is_off, link

LEAST_SHARE = 1e-3
"""The cosine that a row with a smaller one is given: it takes what the others leave."""


@remembered
def budget_clip(budget: float = 0.3, *, power: float = 3.0) -> Transform:
    r"""Limit the mean norm of the rows, and let rows that agree have more of it.

    With n_i = ‖g_i‖, their mean m, and b = budget · (m of the first step):

        m <= b:  g_i ← g_i
        m > b:   g_i ← g_i · min(1, c·φ_i / n_i),  φ_i = max(s_i, 0.001)^power,

    c such that the mean of the new norms is b²/m. s_i is the cosine of row i with the sum of the
    other unit rows, as in `consensus_filter`.

    While right labels are learnt the mean norm falls under the budget and nothing is changed any
    more. Wrong labels keep it high: then the budget is small, the smaller the more rows are
    wrong, and it goes to the rows that agree.

    On scikit-learn's digits, before mean_rows, sgd(0.2, momentum=0.9) and ema_params(0.99), the
    rows per sample, a small network ends at 98.3, 96.5 and 94.4 % with 0, 30 and 50 % wrong
    labels; plain training, at the best rate for each of the first two, at 98.1 and 94.4 %
    (`benchmarks/label_noise.py`). No other task was tried.

    Args:
        budget: Above 0, as a fraction of the mean row norm of the first step.
        power: At least 0. How much more agreement counts than equality; at 0 nothing is compared,
            every row has the same limit, and the rule costs no more than `clip_per_row`.

    Needs: rows; of several ranks those of all, so its place is behind `across_ranks`. A state of
    one number, the mean norm of the first step that was not skipped.

    Publishes: ``norm`` (M,) before clipping, ``clipped_fraction`` (), ``allowed`` (), the mean of
    the norms that is allowed (Inf where m <= b), and with a power ``cosine`` (M,): s, NaN for a
    row that is not finite. Such a row stays as it is, and has no part in the means.

    Raises:
        ValueError: budget <= 0 or power < 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[3.0], [1.0]])}, {"w": torch.zeros(1)}
        >>> link = gf.budget_clip(0.5, power=0)  # mean norm 2: at most 0.5 is left of it
        >>> link.update(rows, link.init(params), params)[0].sq_norms().sqrt()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    fix = "It is a fraction of the mean row norm of the first step; 0.3 is a good start."
    check_number("budget_clip", "budget", budget, low=0, open_low=True, fix=fix)
    check_number("budget_clip", "power", power, low=0, fix="3 is a good start, 0 compares nothing.")

    def init(params: Params) -> State:
        # Of the parameters' precision, whatever torch's default is.
        first = _tree.at_least_float32(next(iter(params.values())))
        return {"first": torch.zeros((), dtype=first.dtype, device=_tree.device_of(params))}

    def update(
        rows: GradStack, state: State, params: Params, /, **extra: Any
    ) -> tuple[GradStack, State, Out]:
        sq_norms = rows.sq_norms()
        usable = rows.live & sq_norms.isfinite()
        norms = torch.where(usable, sq_norms, 0.0).sqrt()
        mean = norms.sum() / usable.sum().clamp(min=1)
        first = torch.where(state["first"] > 0, state["first"].to(mean.dtype), mean)
        limit = budget * first
        over = mean > limit
        allowed = limit * limit / torch.where(over, mean, 1.0)
        shares, published = _shares(rows, params, power, usable, norms)
        level = _level(norms, shares, allowed * usable.sum())
        clipped = over & (norms > level * shares)
        factors = torch.where(clipped, level * shares / torch.where(clipped, norms, 1.0), 1.0)
        # A factor of 0 would take the row out of means: a short row is still one of M.
        factors = factors.clamp(min=torch.finfo(factors.dtype).tiny)
        out = {
            "norm": sq_norms.sqrt(),
            "clipped_fraction": clipped.to(norms.dtype).mean(),
            "allowed": torch.where(over, allowed, torch.inf),
            **published,
        }
        return rows.scaled(factors), {"first": first}, out

    return link(
        "budget_clip",
        "rows -> rows",
        update,
        init=init,
        publishes=("norm", "clipped_fraction", "allowed", *([] if is_off(power) else ["cosine"])),
    )


def _shares(
    rows: GradStack, params: Params, power: float | Tensor, usable: Tensor, norms: Tensor
) -> tuple[Tensor, Out]:
    """φ, 0 for rows that take no part, and the cosines if they were asked for."""
    if is_off(power):
        return usable.to(norms.dtype), {}
    cosine, compared = cosines_with_others(rows, params)
    shares = cosine.clamp(min=LEAST_SHARE).to(norms.dtype) ** power
    return torch.where(usable, shares, 0.0), {"cosine": torch.where(compared, cosine, torch.nan)}


def _level(norms: Tensor, shares: Tensor, total: Tensor) -> Tensor:
    """The level c with Σ min(n_i, c·φ_i) = total, which is less than Σ n_i.

    Rows are filled in the order of n_i/φ_i; the first that does not get all of its norm, and all
    after it, divide what is left by their shares.
    """
    part = shares > 0
    full_at, order = torch.where(part, norms / torch.where(part, shares, 1.0), 0.0).sort()
    norms, shares = norms[order], shares[order]
    filled = norms.cumsum(0) - norms
    # Summed from the end: beside large shares the difference of two sums would lose small ones.
    waiting = shares.flip(0).cumsum(0).flip(0)
    levels = (total - filled) / torch.where(waiting > 0, waiting, 1.0)
    short = (levels <= full_at) & (waiting > 0)
    # Where rounding leaves no row short, nothing is to be clipped.
    first = levels.gather(0, short.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)
    return torch.where(short.any(), first, torch.inf)
