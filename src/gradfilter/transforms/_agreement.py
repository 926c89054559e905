"""Gradient agreement filtering: drop the microbatches whose gradients disagree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._link import check_distance, check_number, link
from gradfilter.transforms._running import EPS, Judged, against_running, masked_gram


@remembered
def agree_filter(
    threshold: float = 0.97,
    *,
    against: Literal["running", "first"] = "running",
    average: Literal["mean", "halving"] = "mean",
    min_accepted: int = 2,
) -> Transform:
    r"""Merge the microbatch gradients that agree; skip the step if fewer than two do.

    Start from the first finite row, c = g_1, n = 1. For every further row in order, with the
    cosine distance d = 1 − ⟨c, g_i⟩ / (max(‖c‖, ε) max(‖g_i‖, ε)) and ε = 1e-8,

        if d <= threshold:  c ← (n c + g_i) / (n + 1),  n ← n + 1

    Computed from the Gram alone: O(M²) numbers after one `gram()`, one `combine()`.

    Args:
        threshold: Largest accepted cosine *distance*, in [0, 2]; 0.95 to 0.98 is typical, and 0.97
            means a cosine of at least 0.03. A cosine *similarity* s is threshold 1 − s: 0.03 as
            a similarity is 0.97 here. From 2 on every finite row is accepted.
        against: ``"running"`` compares with the mean c of what was accepted so far, as the paper
            does; ``"first"`` compares everything with the first row.
        average: ``"mean"`` weighs accepted rows equally. ``"halving"`` sets c ← (c + g_i)/2, as
            the authors' package does: the last accepted row then has half of all weight.
        min_accepted: Rows, the first included, without which the step is skipped.

    Needs: rows, at least two.

    Publishes: ``keep`` (), ``weights`` (M,), ``accepted`` (M,) bool, ``cosine`` (M,): the cosine
    each row was judged by, 1 for the first finite row, NaN for a row that is not finite.

    A row that is not finite, or that finite_filter removed, is rejected and masked. A zero row has
    distance 1.

    Raises:
        ValueError: a finite threshold outside [0, 2], an unknown option, or a stack of one row.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.2], [-1.0, 0.1]])}
        >>> link, params = gf.agree_filter(0.97), {"w": torch.zeros(2)}
        >>> grads, _, out = link.update(rows, link.init(params), params)
        >>> grads, out["accepted"]
        ({'w': tensor([1.0000, 0.1000])}, tensor([ True,  True, False]))

    References:
        Chaubard, Eddy, Kochenderfer, "Beyond Gradient Averaging in Parallel Optimization: Improved
        Robustness through Gradient Agreement Filtering", 2024, https://arxiv.org/abs/2412.18052
    """
    check_distance("agree_filter", threshold, "0.97 is a good start.")
    check_number("agree_filter", "min_accepted", min_accepted, low=1, fix="Use 2.")
    if against not in ("running", "first") or average not in ("mean", "halving"):
        raise ValueError(
            'agree_filter: expected against "running" or "first" and average "mean" or "halving", '
            f"found against={against!r}, average={average!r}."
        )

    def update(
        rows: GradStack, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        if len(rows) < 2:
            raise ValueError(
                "agree_filter: expected at least two rows, found M = 1, which has nothing to agree "
                "with. Use microbatch_grads(loss, M) with M >= 2, or mean_rows()."
            )
        gram = rows.gram()
        rule = _against_first if against == "first" else against_running
        weights, accepted, cosine = rule(
            gram, rows.live & gram.diagonal().isfinite(), threshold, average
        )
        keep = accepted.sum() >= min_accepted
        out = {"keep": keep, "weights": weights, "accepted": accepted, "cosine": cosine}
        return rows.combine(weights), state, out

    return link(
        "agree_filter",
        "rows -> tree",
        update,
        publishes=("keep", "weights", "accepted", "cosine"),
    )


def _agrees(cosine: Tensor, threshold: float | Tensor) -> Tensor:
    # From 2 on nothing is compared: in floating point a cosine may fall below −1. NaN is False.
    return (1 - cosine <= threshold) | (threshold >= 2)


def _against_first(gram: Tensor, usable: Tensor, threshold: float | Tensor, average: str) -> Judged:
    """Every row compared with the first usable one."""
    k = masked_gram(gram, usable)
    norms = k.diagonal().clamp(min=0).sqrt().clamp(min=EPS)
    anchor = usable & (usable.cumsum(0) == 1)
    anchor_row = torch.where(anchor[:, None], k, 0.0).sum(0)
    anchor_norm = torch.where(anchor, norms, 0.0).sum()
    cosine = torch.where(anchor, 1.0, anchor_row / (anchor_norm * norms))
    accepted = usable & (anchor | _agrees(cosine, threshold))
    if average == "mean":
        weights = accepted / accepted.sum().clamp(min=1).to(k.dtype)
    else:
        # Row r of R accepted ones: halved R − r times, and the first as often as the second.
        rank = accepted.cumsum(0)
        halvings = rank[-1] - rank + (rank > 1)
        weights = torch.where(accepted, 0.5 ** halvings.to(k.dtype), 0.0)
    return weights, accepted, torch.where(usable, cosine, torch.nan)
