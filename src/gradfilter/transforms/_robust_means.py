"""Robust means of rows: a few rows, however far out, move the result by a bounded amount only.

`trimmed_mean` and `coordinate_median` sort every coordinate, `geometric_median` and `centered_clip`
weight whole rows. All of them treat what is not finite alike: as an outlier at infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._readable import followed
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._transform import check_number, transform_in_context

# --- Means of the middle values of every coordinate ---


@factory
def trimmed_mean(k: float | Tensor) -> Transform:
    r"""Drop the k largest and the k smallest values of every coordinate, and average the rest.

    With the values x_(1) <= ... <= x_(n) of one coordinate in the n rows that take part,

        k' = min(k, ⌊(n − 1)/2⌋),    (x_(k'+1) + ... + x_(n−k')) / (n − 2k').

    So with too few rows it is the median, as in `coordinate_median`, and with k = 0 the mean. No
    coordinate depends on another one, and rows of wrong labels that are wrong in different
    coordinates are trimmed there only. Up to k rows, whatever is in them, cannot move a
    coordinate out of the range of the others.

    A value that is not finite counts as an outlier: NaN and Inf as the largest values, −Inf as the
    smallest. k' of them on a side are dropped; with more, the coordinate is not finite.

    Args:
        k: The number of values to drop on each side, >= 0; between whole numbers, where a schedule
            may end, it is rounded down. To be safe from some fraction of wrong rows, take that
            fraction of n.

    Needs: rows. Publishes nothing: rows have other weights in every coordinate, so `sam_perturb`
    and `gsam_decompose` cannot follow.

    Cost: every coordinate is sorted, piece by piece. A stack that does not hold its rows makes
    those of one leaf at a time. On several ranks every rank sorts some of the coordinates, and
    sends as much as for a Gram and a combination.

    Raises:
        ValueError: k < 0, or a fraction below 1.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, -9.0], [3.0, 2.0], [2.0, 4.0], [100.0, 3.0]])}
        >>> gf.trimmed_mean(1).update(rows, {}, {"w": torch.zeros(2)})[0]
        {'w': tensor([2.5000, 2.5000])}

    References:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
        Statistical Rates", 2018, https://arxiv.org/abs/1803.01498
    """
    fix = "It is the number of rows to drop on each side, not a fraction; 1 is a start for 8 rows."
    check_number("trimmed_mean", "k", k, low=0, fix=fix)
    if not isinstance(k, Tensor) and 0 < k < 1:
        raise ValueError(f"trimmed_mean: expected k as a whole number >= 0, found k={k}. {fix}")
    return transform_in_context("trimmed_mean", "rows -> tree", _MiddleMean(k))


@factory
def coordinate_median() -> Transform:
    r"""Take the median of the rows in every coordinate.

    With the values x_(1) <= ... <= x_(n) of one coordinate in the n rows that take part, it is
    x_((n+1)/2) for odd n, and the mean of the middle two for even n. (`torch.median` takes the
    smaller one.) This is `trimmed_mean` with the largest k.

    Fewer than half of the rows, whatever is in them, cannot move a coordinate out of the range of
    the others. A value that is not finite counts as an outlier: NaN and Inf as the largest values,
    −Inf as the smallest. If one reaches the middle, the coordinate is not finite.

    Needs: rows. Publishes nothing: rows have other weights in every coordinate, so `sam_perturb`
    and `gsam_decompose` cannot follow.

    Cost: that of `trimmed_mean`.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, -9.0], [3.0, 2.0], [100.0, 3.0]])}
        >>> gf.coordinate_median().update(rows, {}, {"w": torch.zeros(2)})[0]
        {'w': tensor([3., 2.])}

    References:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
        Statistical Rates", 2018, https://arxiv.org/abs/1803.01498
    """
    return transform_in_context("coordinate_median", "rows -> tree", _MiddleMean(None))


@dataclass(frozen=True, eq=False)
class _MiddleMean:
    """The computation of `trimmed_mean`; k is None for the median."""

    k: float | Tensor | None

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        live = rows.live
        count = live.sum()
        dropped = ((count - 1) // 2).clamp(min=0)
        if isinstance(self.k, Tensor):
            dropped = torch.minimum(dropped, self.k.floor().to(dropped))
        elif self.k is not None:
            dropped = dropped.clamp(max=int(min(self.k, 2**31)))
        places = torch.arange(live.shape[0], device=live.device)
        middle = (places >= dropped) & (places < count - dropped)
        return rows.reduce_columns(_MiddleOfColumns(live, middle)), state, {}


@dataclass(frozen=True, eq=False)
class _MiddleOfColumns:
    """The mean of the middle values of every column.

    Attributes:
        live: The rows that take part. (M,) bool
        middle: The places of the middle values in the order of all rows, with the rows that take
            no part at the end. (M,) bool
    """

    live: Tensor
    middle: Tensor

    def __call__(self, columns: Tensor) -> Tensor:
        values = _tree.at_least_float32(columns)  # (M, n)
        largest = self.live[:, None].logical_not() | values.isnan()
        ordered = sorted_columns(torch.where(largest, torch.inf, values))
        chosen = torch.where(self.middle[:, None], ordered, 0.0)
        return chosen.sum(0) / self.middle.sum().clamp(min=1)


FEW = 32
"""Rows up to which a sorting network is faster on a CPU: 4 times at 8 rows, 6 times at 32."""


def sorted_columns(values: Tensor) -> Tensor:
    """Sort every column of (M, n) without NaN in ascending order. (M, n)."""
    if values.device.type != "cpu" or followed() or len(values) > FEW:
        return values.sort(0).values
    rows = list(values.unbind())
    for low, high in comparators(len(rows)):
        smaller = torch.minimum(rows[low], rows[high])
        rows[high] = torch.maximum(rows[low], rows[high])
        rows[low] = smaller
    return torch.stack(rows)


@cache
def comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of places that Batcher's merge exchange sort compares, in order."""
    found: list[tuple[int, int]] = []
    run = 1  # the length of the sorted runs that are merged
    while run < count:
        step = run
        while step >= 1:
            for start in range(step % run, count - step, 2 * step):
                found += [
                    (low, low + step)
                    for low in range(start, min(start + step, count - step))
                    if low // (2 * run) == (low + step) // (2 * run)
                ]
            step //= 2
        run *= 2
    return tuple(found)


# --- Weighted means of whole rows ---


@factory
def geometric_median(steps: int = 8, *, eps: float = 1e-3) -> Transform:
    r"""Take the point with the smallest sum of distances to the rows, by Weiszfeld's iteration.

    The result is a convex combination v = Σ w_i g_i, so the iteration needs only the weights. With
    the median m of the norms of the rows,

        start:  w_i ∝ 1 / max(‖g_i‖, m)            (rows clipped to the norm m, up to a factor)
        step:   w_i ∝ 1 / max(‖g_i − v‖, eps·m),   Σ w_i = 1.

    Fewer than half of the rows, whatever is in them, move the result by a bounded amount only. In
    contrast to `coordinate_median` it does not depend on the choice of coordinates, and it weights
    rows as a whole. A row that is not finite is infinitely far: its weight is 0. If half of the
    rows that take part or more are not finite, so is the result.

    Args:
        steps: The number of steps, >= 1. The paper takes three to five.
        eps: The smallest distance, as a fraction of m, above 0. Distances are differences of inner
            products, so those below 3e-4 of the norm of float32 rows are rounding.

    Needs: rows. Publishes: ``weights`` (M,), ``distance`` (M,), the distance of every row from the
    point before the last step, NaN for rows that are not finite or take no part.

    Cost: with few rows, or if the stack has a cheap Gram, one Gram and one `combine`: the steps
    need M² numbers each. Else one `combine` and one `dot` per step.

    Raises:
        ValueError: steps is not a whole number >= 1, or eps <= 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1, -1], [0, 0], [9, 9]])}
        >>> median, params = gf.geometric_median(), {"w": torch.zeros(2)}
        >>> median.update(rows, {}, params)[2]["weights"].argmax().item()
        3

    References:
        Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", 2019,
        https://arxiv.org/abs/1912.13445
    """
    _check_steps("geometric_median", steps)
    fix = "It is a fraction of the median norm of the rows; 1e-3 is usual."
    check_number("geometric_median", "eps", eps, low=0, open_low=True, fix=fix)
    return transform_in_context(
        "geometric_median",
        "rows -> tree",
        _GeometricMedian(steps, eps),
        publishes=("weights", "distance"),
    )


def _check_steps(name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"{name}: expected steps as a whole number >= 1, found steps={steps!r}. It counts the "
            "iterations, which cannot be scheduled."
        )


@dataclass(frozen=True, eq=False)
class _GeometricMedian:
    """The computation of `geometric_median`, with its arguments."""

    steps: int
    eps: float | Tensor

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        distances: _GramDistances | _ProductDistances
        if rows.gram_is_cheap():
            gram = rows.gram()
            distances = _GramDistances(gram, gram.diagonal())
        else:
            distances = _ProductDistances(rows, rows.sq_norms())
        usable = rows.live & distances.sq_norms.isfinite()
        norms = torch.where(usable, distances.sq_norms, 0.0).clamp(min=0).sqrt()
        middle = _median(norms, usable)
        weights = _shares(norms, middle, usable)
        distance = norms
        for _ in range(self.steps):
            distance = distances.to_combination(weights)
            weights = _shares(distance, self.eps * middle, usable)
        weights = torch.where(_mostly_finite(rows.live, usable), weights, torch.nan)
        out = {"weights": weights, "distance": torch.where(usable, distance, torch.nan)}
        return rows.combine(weights), state, out


def _median(norms: Tensor, usable: Tensor) -> Tensor:
    """Return the (smaller) median of the usable norms, or a larger one if it is 0. ()."""
    ordered = torch.where(usable, norms, torch.inf).sort().values
    place = (usable.sum() - 1).div(2, rounding_mode="floor").clamp(min=0)
    chosen = torch.arange(len(norms), device=norms.device) == place
    middle = torch.where(chosen & ordered.isfinite(), ordered, 0.0).sum()
    # With zero rows as its half, the median is 0; any scale then separates them from the others.
    largest = norms.amax()
    middle = torch.where(middle > 0, middle, largest)
    return torch.where(middle > 0, middle, 1.0)


def _shares(distance: Tensor, smallest: Tensor, usable: Tensor) -> Tensor:
    """Return weights in proportion to 1/max(distance, smallest), with sum 1. (M,)."""
    inverse = torch.where(usable, smallest / torch.maximum(distance, smallest), 0.0)
    total = inverse.sum()
    return inverse / torch.where(total > 0, total, 1.0)


def _mostly_finite(live: Tensor, usable: Tensor) -> Tensor:
    """Return whether fewer than half of the rows that take part are not finite. () bool."""
    lost = live.sum() - usable.sum()
    return (2 * lost < live.sum()) | (lost == 0)


@dataclass(frozen=True, eq=False)
class _GramDistances:
    """The distances of the rows from Σ w_i g_i, by their Gram.

    Attributes:
        gram: K. (M, M)
        sq_norms: Its diagonal. (M,)
    """

    gram: Tensor
    sq_norms: Tensor

    def to_combination(self, weights: Tensor) -> Tensor:
        """Return √(K_ii − 2 (K w)_i + wᵀ K w). (M,)."""
        chosen = weights > 0
        known = torch.where(chosen[:, None] & chosen, self.gram, 0.0)
        products = torch.where(chosen, self.gram * weights, 0.0).sum(1)  # K w
        sq_norm = (weights * (known * weights).sum(1)).sum()
        return (self.sq_norms - 2 * products + sq_norm).clamp(min=0).sqrt()


@dataclass(frozen=True, eq=False)
class _ProductDistances:
    """The distances of the rows from Σ w_i g_i, by products with that sum.

    Attributes:
        rows: The rows.
        sq_norms: Their squared norms. (M,)
    """

    rows: GradStack
    sq_norms: Tensor

    def to_combination(self, weights: Tensor) -> Tensor:
        """Return √(‖g_i‖² − 2 ⟨g_i, v⟩ + ‖v‖²), v = Σ w_j g_j. (M,)."""
        return distances_to(self.rows, self.sq_norms, self.rows.combine(weights))


def distances_to(rows: GradStack, sq_norms: Tensor, centre: Tree) -> Tensor:
    """Return the distances of all rows from a tree. (M,)."""
    sq_norm = _products.sq_norm(centre).to(sq_norms.dtype)
    return (sq_norms - 2 * rows.dot(centre) + sq_norm).clamp(min=0).sqrt()


@factory
def centered_clip(radius: float, *, steps: int = 1) -> Transform:
    r"""Move the last result towards the rows, each of which pulls by at most ``radius``.

    From the result v of the last step (0 in the first),

        v ← v + 1/n Σ_i (g_i − v) · min(1, radius / ‖g_i − v‖)

    over the n rows that take part, repeated ``steps`` times. A row far out moves the result by
    radius/n at most. The paper gives it the momenta of workers in place of their gradients, and
    shows that rules without a memory fail against small wrong rows that come in every step.

    A row that is not finite is infinitely far in an unknown direction: it pulls nowhere, but counts
    in n. If half of the rows that take part or more are not finite, so is the result.

    Args:
        radius: The largest pull of a row, above 0. About the usual distance of a row from the mean;
            much smaller ones delay the result as a long momentum does.
        steps: The number of repetitions, >= 1.

    Needs: rows. The state is v, one gradient. A skipped step leaves it.

    Publishes: ``distance`` (M,) of every row from v before the last repetition, NaN for rows that
    are not finite or take no part, and ``clipped_fraction`` (), of the finite rows. No ``weights``,
    because v is not a combination of these rows: `sam_perturb` and `gsam_decompose` cannot follow.

    Cost: the norms, and for every repetition one `dot` and one `combine`; one gradient of memory.

    Raises:
        ValueError: radius <= 0, or steps is not a whole number >= 1.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[1.0], [2.0], [-90.0]])}, {"w": torch.zeros(1)}
        >>> clip = gf.centered_clip(2.0)
        >>> grads, state, _ = clip.update(rows, clip.init(params), params)
        >>> grads, clip.update(rows, state, params)[0]  # (1 + 2 − 2)/3, then again from there
        ({'w': tensor([0.3333])}, {'w': tensor([0.4444])})

    References:
        Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", 2021,
        https://arxiv.org/abs/2012.10333
    """
    fix = "Take about the distance of a row from the mean, such as the norms in info."
    check_number("centered_clip", "radius", radius, low=0, open_low=True, fix=fix)
    _check_steps("centered_clip", steps)

    def init(params: Params) -> State:
        return {"centre": _tree.zeros_like(params)}

    return transform_in_context(
        "centered_clip",
        "rows -> tree",
        _CenteredClip(radius, steps),
        init=init,
        publishes=("distance", "clipped_fraction"),
    )


@dataclass(frozen=True, eq=False)
class _CenteredClip:
    """The computation of `centered_clip`, with its arguments."""

    radius: float | Tensor
    steps: int

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        sq_norms = rows.sq_norms()
        usable = rows.live & sq_norms.isfinite()
        share = 1 / rows.live.sum().clamp(min=1).to(sq_norms.dtype)
        share = torch.where(_mostly_finite(rows.live, usable), share, torch.nan)
        centre: Tree = state["centre"]
        distance, clipped = sq_norms, usable
        for _ in range(self.steps):
            distance = distances_to(rows, sq_norms, centre)
            clipped = usable & (distance > self.radius)
            pull = torch.where(clipped, self.radius / torch.where(clipped, distance, 1.0), 1.0)
            pull = torch.where(usable, pull, 0.0).to(sq_norms.dtype) * share
            stays = 1 - pull.sum()
            centre = {
                name: _moved(centre[name], stays, pulled)
                for name, pulled in rows.combine(pull).items()
            }
        out = {
            "distance": torch.where(usable, distance, torch.nan),
            "clipped_fraction": clipped.sum() / usable.sum().clamp(min=1),
        }
        return centre, {"centre": centre}, out


def _moved(centre: Tensor, stays: Tensor, pulled: Tensor) -> Tensor:
    wide = _tree.at_least_float32(centre)
    return torch.addcmul(_tree.at_least_float32(pulled), wide, stays.to(wide.dtype)).to(
        centre.dtype
    )
