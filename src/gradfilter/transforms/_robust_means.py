"""Robust means of rows: a few rows, however far out, move the result by a bounded amount only.

`trimmed_mean` and `coordinate_median` sort every coordinate, `geometric_median` and `centered_clip`
weight whole rows. All of them treat what is not finite alike: as an outlier at infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._readable import followed
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._transform import check_number, transform_in_context

# --- Means of the middle values of every coordinate ---


@factory
def trimmed_mean(k: float) -> Transform:
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
