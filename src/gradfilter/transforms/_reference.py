"""Weigh rows by how well they follow a reference gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._row_rules import RowRules
from gradfilter._state_rules import Observing
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._reducers import shares
from gradfilter.transforms._transform import check_leaves, check_number, transform_in_context

Kept = Literal["given", "average", "previous"]
Measure = Literal["product", "cosine"]


@factory
def reference_filter(
    reference: Kept | Mapping[str, Tensor] = "given",
    *,
    soft: bool = True,
    threshold: float = 0.0,
    by: Measure = "product",
    decay: float = 0.9,
) -> Transform:
    r"""Combine the rows with weights from their products with a reference gradient.

    With the reference r and s_i = ⟨g_i, r⟩, or with ``by="cosine"`` s_i = ⟨g_i, r⟩ / (‖g_i‖ ‖r‖),
    over the rows that take part and are finite,

        soft:  w_i ∝ max(0, s_i − threshold), Σ w_i = 1
        hard:  w_i ∝ [s_i > threshold]

    A step along row i lowers the loss whose gradient is r by about lr · ⟨g_i, r⟩. So with the
    gradient of a few samples that are known to be right, rows that would raise their loss get no
    weight. While the reference is zero, all rows have the same weight.

    Args:
        reference: The gradient to follow.
            "given": the keyword ``reference`` of the step, a tree, which `train_step` and the hosts
            of `gradfilter.interop` compute from ``reference_batch=``.
            "average": the moving average of the mean row, r ← decay · r + (1 − decay) · mean(g).
            "previous": the mean row of the step before.
            A dict: this tree in every step.
        soft: True to weight rows by their margin, False to accept or reject them.
        threshold: The largest s that gets no weight; a cosine is in [−1, 1], a product has the
            scale of squared gradients.
        by: "product" or "cosine". With cosines a long row counts as much as a short one.
        decay: The weight of the old average, in [0, 1).

    Averages are of the plain mean of the rows, not of the filtered result: a filter that follows
    its own results can lose all other directions. Their state observes, so that a step without any
    row of positive weight still moves them.

    Needs: rows. Behind `across_ranks` the reference is the mean of those of all ranks.

    Publishes: ``keep`` (), true if a row has positive weight; ``weights`` (M,); ``accepted`` (M,)
    bool (w > 0); ``score`` (M,): s, NaN for a row that is not finite, 0 while the reference is;
    ``total`` (): Σ max(0, s_i − threshold), for products in units of ‖r‖², or the number of rows
    with a weight if all weigh alike.

    Cost: one ``dot`` and one ``combine``, with cosines the norms; an average takes one ``combine``
    and the memory of one gradient more; ``reference_batch`` takes one backward pass over its
    samples. No rows are made. With a given reference, the rows may come in parts: a row's weight
    before the division by the sum depends on no other row. An average needs all rows together,
    because it moves by their mean, a second gradient, which parts do not carry.

    Raises:
        ValueError: An unknown word, decay outside [0, 1), or a cosine threshold outside [−1, 1]. At
            the call: there is no reference, or it has other leaves.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])}
        >>> clean, params = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.zeros(2)}
        >>> gf.reference_filter().update(rows, {}, params, reference=clean)[2]["weights"]
        tensor([0.2500, 0.7500, 0.0000], dtype=torch.float64)

    References:
        Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep Learning", 2018,
        https://arxiv.org/abs/1803.09050
        Sedova, Zellinger, Roth, "Learning with Noisy Labels by Adaptive Gradient-Based Outlier
        Removal", 2023, https://arxiv.org/abs/2306.04502
        Wang et al., "GREATS: Online Selection of High-Quality Data for LLM Training in Every
        Iteration", 2024, https://openreview.net/forum?id=232VcN8tSx
    """
    kept = isinstance(reference, str)
    if kept and reference not in ("given", "average", "previous"):
        raise ValueError(
            'reference_filter: expected reference as "given", "average", "previous" or a dict of '
            f"tensors, found {reference!r}. With a clean batch, use the default and pass "
            "reference_batch= to the step."
        )
    if not kept and not isinstance(reference, Mapping):
        raise TypeError(
            "reference_filter: expected reference as a word or a dict[str, Tensor], found "
            f"{type(reference).__name__}. For a batch of samples, use the default and pass "
            "reference_batch= to the step."
        )
    if by not in ("product", "cosine"):
        raise ValueError(
            f'reference_filter: expected by as "product" or "cosine", found {by!r}. The default is '
            '"product".'
        )
    lowest, highest = (-1.0, 1.0) if by == "cosine" else (float("-inf"), float("inf"))
    check_number(
        *("reference_filter", "threshold", threshold),
        low=lowest,
        high=highest,
        fix="0 accepts rows that lower the reference's loss.",
    )
    check_number(
        "reference_filter", "decay", decay, low=0, high=1, open_high=True, fix="0.9 is usual."
    )
    found = _ReferenceFilter(reference, soft, threshold, by, decay)
    made = transform_in_context(
        "reference_filter",
        "rows -> tree",
        found,
        init=found.init,
        publishes=("keep", "weights", "accepted", "score", "total"),
        row_rules=None
        if found.remembers
        else RowRules(
            {
                **{"keep": "any", "weights": "shares", "accepted": "rows"},
                **{"score": "rows", "total": "sum"},
            },
            reads=frozenset({"reference"}),
            divisor="total",
        ),
    )
    return replace(made, rules=Observing()) if found.remembers else made


@dataclass(frozen=True, eq=False)
class _ReferenceFilter:
    """The computation of `reference_filter`, with its arguments."""

    reference: Kept | Mapping[str, Tensor]
    soft: bool
    threshold: float | Tensor
    by: Measure
    decay: float | Tensor

    @property
    def remembers(self) -> bool:
        """True if the state holds the reference."""
        return self.reference in ("average", "previous")

    def init(self, params: Params) -> State:
        if not self.remembers:
            return {}
        # In half precision small changes of the average would be rounded away.
        wide = {name: _tree.at_least_float32(p) for name, p in params.items()}
        return {"reference": _tree.zeros_like(wide)}

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        reference = self._reference(rows, state, params, context)
        score, usable, known, unit = self._scores(rows, reference)
        if self.soft:
            excess = (score - self.threshold).clamp(min=0)
        else:
            excess, unit = (score > self.threshold).to(score.dtype), torch.ones_like(unit)
        even = usable.to(score.dtype)
        excess = torch.where(known, torch.where(usable, excess, 0.0), even)
        accepted = excess > 0
        weights = shares(excess)
        if self.remembers:
            mean = rows.combine(shares(even))
            state = {"reference": self._moved(reference, mean, usable.any())}
        out = {
            "keep": accepted.any(),
            "weights": weights,
            "accepted": accepted,
            "score": torch.where(usable, score, torch.nan),
            # Gradients times a sum of tiny products could underflow in float32.
            "total": excess.sum() / unit,
        }
        return rows.combine(weights), state, out

    def _reference(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> Mapping[str, Tensor]:
        """Return the reference of this step."""
        if self.remembers:
            found: Tree = state["reference"]
            return found
        given = self.reference
        if isinstance(given, str):
            given = context.reference
            if given is None:
                raise ValueError(
                    "reference_filter: expected the reference gradient as the keyword reference=, "
                    "found none. Call step(state, batch, reference_batch=clean), or "
                    'update(..., reference=grads), or use reference_filter("average").'
                )
        check_leaves("reference_filter: reference", dict(given), params)
        wide = {n: given[n].to(_tree.at_least_float32(p).dtype) for n, p in params.items()}
        # All ranks have to agree about the weights.
        return rows.mean_over_ranks(wide)

    def _scores(
        self, rows: GradStack, reference: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return s (M,), the usable rows (M,) bool, and of the reference whether it is not zero.

        The last result is the unit of s: ‖r‖² (), or 1 for cosines and while r is zero.
        """
        products, size = rows.dot(reference), _products.sq_norm(reference).to(torch.float32)
        known = (size > 0) & size.isfinite()
        unit = torch.where(known, size, 1.0).to(products.dtype)
        usable = rows.live & products.isfinite()
        if self.by == "cosine":
            sq_norms = rows.sq_norms()
            usable = usable & sq_norms.isfinite()
            positive = usable & (sq_norms > 0) & known
            lengths = torch.where(positive, sq_norms, 1.0).sqrt() * _products.norm(reference)
            products = torch.where(positive, products / torch.where(positive, lengths, 1.0), 0.0)
            unit = torch.ones_like(unit)
        return torch.where(usable, products, 0.0), usable, known, unit

    def _moved(self, reference: Mapping[str, Tensor], mean: Tree, seen: Tensor) -> Tree:
        """Return the reference for the next step; the old one if no row was usable."""
        decay = self.decay if self.reference == "average" else 0.0
        return {
            name: torch.where(seen, decay * old + (1 - decay) * mean[name], old)
            for name, old in reference.items()
        }
