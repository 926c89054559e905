"""Gradient agreement filtering: reject the microbatches whose gradients disagree."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._readable import readable
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._transform import (
    check_distance,
    check_number,
    check_predicate,
    transform_in_context,
)

# --- The running comparison: each row against the mean of the rows accepted so far ---


EPS = 1e-8  # clamps each norm separately, as torch.nn.functional.cosine_similarity does

FEW = 128
"""Rows up to which Python numbers are faster: 0.2 or 0.7 ms at 32 rows, 2 or 3 ms at 128."""

Judged = tuple[Tensor, Tensor, Tensor]
"""Weights, accepted and cosine, (M,) each."""


def masked_gram(gram: Tensor, usable: Tensor) -> Tensor:
    """Set the rows and columns of unusable rows in the Gram to 0, so that their weight is 0."""
    return torch.where(usable[:, None] & usable, gram, 0.0)


def against_running(
    gram: Tensor, usable: Tensor, threshold: float | Tensor, average: str
) -> Judged:
    """Compare the rows in order with the running mean.

    With c = Σ a_j g_j, the recurrence updates v = K a, so that ⟨c, g_i⟩ = v_i and ‖c‖² = ⟨v, a⟩. A
    cosine does not depend on the length of c, so the mean is kept as the sum n c, whose norm is at
    least n ε.
    """
    known = not isinstance(threshold, Tensor) or readable(threshold)
    judge = _in_numbers if known and readable(gram) and len(gram) <= FEW else _in_tensors
    return judge(gram, usable, threshold, average == "mean")


def _in_numbers(gram: Tensor, usable: Tensor, threshold: float | Tensor, mean: bool) -> Judged:
    """Run on a CPU: M² multiplications are faster than a dozen tensor operations per row."""
    live = usable.tolist()
    k = (gram if all(live) else masked_gram(gram, usable)).tolist()
    limit = threshold.reshape(1).tolist()[0] if isinstance(threshold, Tensor) else threshold
    smallest_cosine = -math.inf if limit >= 2 else 1 - limit
    count = len(k)
    v, a, n = [0.0] * count, [0.0] * count, 0
    accepted, cosine = [False] * count, [math.nan] * count
    for i, row in enumerate(k):
        if not live[i]:
            continue
        norm = max(math.sqrt(max(row[i], 0.0)), EPS)
        squared = sum(map(operator.mul, v, a))
        length = max(math.sqrt(max(squared, 0.0)), EPS * (n if mean else 1))
        accepted[i] = n == 0 or v[i] >= smallest_cosine * norm * length
        cosine[i] = 1.0 if n == 0 else v[i] / (length * norm)
        if accepted[i]:
            v, a[i] = list(map(operator.add, v, row)), 1.0
            if not mean and n > 0:  # half of the mean so far, and half of this row
                v, a = [x / 2 for x in v], [x / 2 for x in a]
            n += 1
    if mean:
        a = [x / max(n, 1) for x in a]
    return gram.new_tensor(a), usable.new_tensor(accepted), gram.new_tensor(cosine)


def _in_tensors(gram: Tensor, usable: Tensor, threshold: float | Tensor, mean: bool) -> Judged:
    """Run on any device, without waiting for it."""
    k = masked_gram(gram, usable)
    norms = k.diagonal().clamp(min=0).sqrt().clamp(min=EPS)
    anchor = usable & (usable.cumsum(0) == 1)
    threshold = _tree.scalar(threshold, k)
    smallest_cosine = torch.where(threshold >= 2, -torch.inf, 1 - threshold)
    bounds = torch.where(usable, smallest_cosine * norms, torch.inf)
    bounds = torch.where(anchor, -torch.inf, bounds)
    # One vector (v | a | smallest ‖c‖) and one increment per row, to need few tiny operations.
    floor = torch.full_like(norms[:, None], EPS)
    carried = torch.cat([torch.zeros_like(k[0]), torch.zeros_like(k[0]), floor[0]])
    rates = torch.ones_like(norms)
    if mean:
        floor = torch.where(anchor[:, None], 0.0, floor)
    else:
        rates = torch.where(anchor, rates, 0.5)
    parts = torch.cat([k, torch.eye(len(k), dtype=k.dtype, device=k.device), floor], dim=1)
    accepted, products, lengths = [], [], []
    rows = zip(parts.unbind(), bounds.unbind(), rates.unbind(), strict=True)
    for i, (part, bound, rate) in enumerate(rows):
        v, a, smallest = torch.split(carried, [len(k), len(k), 1])
        length = torch.fmax(torch.dot(v, a).sqrt(), smallest)
        accept = v[i] >= bound * length
        rate = torch.where(accept, rate, 0.0)
        carried = torch.addcmul(carried, part, rate) if mean else torch.lerp(carried, part, rate)
        products.append(v[i])
        lengths.append(length)
        accepted.append(accept)
    weights = carried[len(k) : -1]
    if mean:
        weights = weights / weights.sum().clamp(min=1)
    cosine = torch.stack(products) / (torch.cat(lengths) * norms)
    cosine = torch.where(anchor, 1.0, cosine)
    return weights, torch.cat(accepted), torch.where(usable, cosine, torch.nan)


# --- The filter ---


@factory
def agree_filter(
    threshold: float = 0.97,
    *,
    against: Literal["running", "first"] = "running",
    average: Literal["mean", "halving"] = "mean",
    min_accepted: int = 2,
    per: Literal["leaf", "layer"] | None = None,
    exclude: Callable[[str], bool] | None = None,
) -> Transform:
    r"""Merge the microbatch gradients that agree; skip the step if fewer than two do.

    Start from the first finite row, c = g_1, n = 1. For every further row in order, with the
    cosine distance d = 1 − ⟨c, g_i⟩ / (max(‖c‖, ε) max(‖g_i‖, ε)) and ε = 1e-8,

        if d <= threshold:  c ← (n c + g_i) / (n + 1),  n ← n + 1

    Computed from the Gram alone: O(M²) numbers after one `gram()`, one `combine()`.

    Args:
        threshold: The largest accepted cosine *distance*, in [0, 2]; 0.95 to 0.98 is typical, and
            0.97 means a cosine of at least 0.03. A cosine *similarity* s is threshold 1 − s: 0.03
            as a similarity is 0.97 here. From 2 on every finite row is accepted.
        against: ``"running"`` compares with the mean c of the rows accepted so far, as the paper
            does; ``"first"`` compares all rows with the first one.
        average: ``"mean"`` gives accepted rows equal weights. ``"halving"`` sets c ← (c + g_i)/2,
            as the authors' package does: the last accepted row then has half of all weight.
        min_accepted: The number of accepted rows, including the first, below which the step is
            skipped, or with ``per`` the gradient of the group is 0.
        per: ``"leaf"`` compares the rows on every parameter tensor by itself, ``"layer"`` on all
            parameters of a module, whose names agree up to the last dot. None compares whole rows.
        exclude: Predicate on names; such a leaf is not compared, and gets the mean of all finite
            rows.

    With ``per``, the gradient of a group without agreement is 0, and the step is skipped only if no
    group agrees. So momentum and weight decay still move such a group: it is to the update rule as
    if the batch had no gradient there. A group that has to stay where it is needs a chain of its
    own, in `partition`.

    Needs: rows, at least two.

    Publishes: ``keep`` (), ``weights`` (M,), ``accepted`` (M,) bool, ``cosine`` (M,): the cosine
    of each row with its reference, 1 for the first finite row, NaN for a row that is not finite.
    With ``per`` and G groups, in the order of the parameters, ``accepted`` and ``cosine`` are (G,
    M), and ``agreed`` (G,) bool says which groups agree. With ``per`` or ``exclude`` there are no
    ``weights``: a row has several, so that `sam_perturb` and `gsam_decompose` cannot follow.

    Cost: one Gram and one `combine`; with ``per`` the Gram of every leaf, and weights of its own
    for every leaf in the combination, each in one pass. `across_ranks` exchanges every leaf by
    itself, and then sends as much again as for a combination without a Gram.

    A row that is not finite, or that finite_filter removed, is rejected and masked. A zero row has
    distance 1.

    Raises:
        ValueError: a finite threshold outside [0, 2], an unknown option, a stack of one row, or
            ``exclude`` is true for all leaves.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.2], [-1.0, 0.1]])}
        >>> agree, params = gf.agree_filter(0.97), {"w": torch.zeros(2)}
        >>> grads, _, out = agree.update(rows, agree.init(params), params)
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
    if per not in (None, "leaf", "layer"):
        raise ValueError(
            f'agree_filter: expected per "leaf", "layer" or None, found per={per!r}. Use partition '
            "for groups of your own."
        )
    if exclude is not None:
        check_predicate("agree_filter", "exclude", exclude)

    agreement = _Agreement(threshold, against, average, min_accepted)
    if per is None and exclude is None:
        return transform_in_context(
            "agree_filter",
            "rows -> tree",
            agreement,
            publishes=("keep", "weights", "accepted", "cosine"),
        )
    grouped = _GroupedAgreement(agreement, per, exclude)
    return transform_in_context(
        "agree_filter",
        "rows -> tree",
        grouped,
        init=grouped.init,
        publishes=("keep", "accepted", "cosine", *([] if per is None else ["agreed"])),
    )


@dataclass(frozen=True, eq=False)
class _Agreement:
    """The computation of `agree_filter`, with its arguments."""

    threshold: float | Tensor
    against: str
    average: str
    min_accepted: int

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        _check_several(rows)
        gram = rows.gram()
        usable = rows.live & gram.diagonal().isfinite()
        weights, accepted, cosine = self.judge(gram, usable)
        keep = accepted.sum() >= self.min_accepted
        out = {"keep": keep, "weights": weights, "accepted": accepted, "cosine": cosine}
        return rows.combine(weights), state, out

    def judge(self, gram: Tensor, usable: Tensor) -> Judged:
        """Compare the rows of a Gram."""
        rule = _against_first if self.against == "first" else against_running
        return rule(gram, usable, self.threshold, self.average)


def _check_several(rows: GradStack) -> None:
    if rows.live.shape[0] < 2:  # in a trace a symbol, which len would turn into a number
        raise ValueError(
            "agree_filter: expected at least two rows, found M = 1, which has nothing to agree "
            "with. Use microbatch_grads(loss, M) with M >= 2, or mean_rows()."
        )


@dataclass(frozen=True, eq=False)
class _GroupedAgreement:
    """The agreement of every group of leaves by itself, without the excluded leaves.

    Attributes:
        agreement: The comparison of the rows of a group.
        per: See `agree_filter`; None for one group.
        exclude: See `agree_filter`.
    """

    agreement: _Agreement
    per: str | None
    exclude: Callable[[str], bool] | None

    def init(self, params: Params) -> State:
        self.groups(params)
        return {}

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        _check_several(rows)
        groups = self.groups(params)
        place = {name: g for g, names in enumerate(groups) for name in names}
        compared = rows.columns(list(place))
        grams = self._grams(compared, groups)  # (G, M, M)
        sq_norms = grams.diagonal(dim1=1, dim2=2).sum(0)
        left = [name for name in params if name not in place]
        excluded = rows.columns(left) if left else None
        if excluded is not None:
            sq_norms = sq_norms + excluded.sq_norms()
        usable = rows.live & sq_norms.isfinite()
        weights, accepted, cosine = self._judged(grams, usable)  # (G, M)
        agreed = accepted.sum(1) >= self.agreement.min_accepted
        own = torch.where(agreed[:, None], weights, 0.0).unbind()
        found = compared.combine_leaves({name: own[g] for name, g in place.items()})
        if excluded is not None:
            shares = usable.to(weights.dtype)
            found |= excluded.combine(shares / shares.sum().clamp(min=1))
        out = {"keep": agreed.any(), "accepted": accepted, "cosine": cosine, "agreed": agreed}
        if self.per is None:
            out = {"keep": agreed[0], "accepted": accepted[0], "cosine": cosine[0]}
        return {name: found[name] for name in params}, state, out

    def groups(self, params: Params) -> list[list[str]]:
        """Return the names of the leaves of every group."""
        found: dict[str, list[str]] = {}
        for name in params:
            if self.exclude is None or not self.exclude(name):
                group = name if self.per == "leaf" else name.rpartition(".")[0]
                found.setdefault("" if self.per is None else group, []).append(name)
        if not found:
            raise ValueError(
                f"agree_filter: expected a leaf that is not excluded, found none among "
                f"{sorted(params)}. Use mean_rows() if no leaf is to be compared."
            )
        return list(found.values())

    def _grams(self, rows: GradStack, groups: list[list[str]]) -> Tensor:
        if self.per is None:
            return rows.gram()[None]
        grams = rows.leaf_grams()
        return torch.stack([torch.stack([grams[n] for n in names]).sum(0) for names in groups])

    def _judged(self, grams: Tensor, usable: Tensor) -> Judged:
        """Compare the rows of every group."""
        judge = partial(self.agreement.judge, usable=usable)
        if not readable(grams):  # all groups by the operations of one
            judged: Judged = torch.vmap(judge)(grams)
            return judged
        weights, accepted, cosine = zip(*map(judge, grams.unbind()), strict=True)
        return torch.stack(weights), torch.stack(accepted), torch.stack(cosine)


def _agrees(cosine: Tensor, threshold: float | Tensor) -> Tensor:
    # A threshold from 2 on accepts all rows, as a rounded cosine may be below −1. NaN is False.
    return (1 - cosine <= threshold) | (threshold >= 2)


def _against_first(gram: Tensor, usable: Tensor, threshold: float | Tensor, average: str) -> Judged:
    """Compare every row with the first usable one."""
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
        # Row r of R accepted rows is halved R − r times, and the first as often as the second.
        rank = accepted.cumsum(0)
        halvings = rank[-1] - rank + (rank > 1)
        weights = torch.where(accepted, 0.5 ** halvings.to(k.dtype), 0.0)
    return weights, accepted, torch.where(usable, cosine, torch.nan)
