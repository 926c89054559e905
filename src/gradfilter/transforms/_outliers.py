"""Remove rows that stand out among the rows of a step, by their norm or by their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _products
from gradfilter._factory import factory
from gradfilter._types import Context, Out, Params, State, Transform
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._transform import check_number, transform_in_context

Quantity = Literal["norm", "loss"]


@factory
def outlier_filter(
    factor: float = 3.0, *, of: Quantity = "norm", center: Literal["median", "mean"] = "median"
) -> Transform:
    """Remove the rows whose norm or loss is far above the middle of the rows.

    Row i takes part if x_i <= factor · center(x), with x_i = ‖g_i‖ or the loss of row i, and the
    median or the mean over the rows that take part and are finite. A row that is not finite is
    removed as well.

    Args:
        factor: At least 1; 3 removes what is longer than three times the median.
        of: "norm" or "loss". Losses must not be negative.
        center: "median" or "mean". One huge row moves the mean, but hardly the median.

    Needs: rows, for "loss" with losses; with several ranks the rows of all, so put it behind
    `across_ranks`. Publishes: ``keep`` (), true if a row is left; ``accepted`` (M,) bool; ``limit``
    (). Cost: the norms of the rows, or nothing for losses; no pass, no state.

    Raises:
        ValueError: factor < 1, or an unknown word. At the call: the losses are not known.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[1.0], [2.0], [3.0], [50.0]])}, {"w": torch.zeros(1)}
        >>> gf.outlier_filter(3.0).update(rows, {}, params)[2]["accepted"]
        tensor([ True,  True,  True, False])

    References:
        Sun, Kairouz, Suresh, McMahan, "Can You Really Backdoor Federated Learning?", 2019,
        https://arxiv.org/abs/1911.07963, which bounds norms for the same reason.
    """
    check_number("outlier_filter", "factor", factor, low=1, fix="3 is a good start.")
    _check_word("outlier_filter", "of", of, ("norm", "loss"))
    _check_word("outlier_filter", "center", center, ("median", "mean"))
    return transform_in_context(
        "outlier_filter",
        "rows -> rows",
        _OutlierFilter(factor, of, center),
        publishes=("keep", "accepted", "limit"),
    )


@dataclass(frozen=True, eq=False)
class _OutlierFilter:
    """The computation of `outlier_filter`, with its arguments."""

    factor: float | Tensor
    of: Quantity
    center: Literal["median", "mean"]

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[GradStack, State, Out]:
        if self.of == "norm":
            values = rows.sq_norms().sqrt()
        else:
            values = losses_of("outlier_filter", rows, 'outlier_filter(of="norm")')
        usable = rows.live & values.isfinite()
        known = torch.where(usable, values, torch.nan)
        # With an even number of rows `nanmedian` would take the lower one of the two in the middle.
        median = self.center == "median"
        middle = _products.known_quantile(known, 0.5) if median else known.nanmean()
        limit = middle * self.factor
        accepted = usable & (values <= limit)
        out = {"keep": accepted.any(), "accepted": accepted, "limit": limit}
        return rows.scaled(accepted.to(limit.dtype)), state, out


@factory
def trim_losses(fraction: float) -> Transform:
    r"""Remove the rows of highest loss, as trimmed losses do against wrong labels.

    Of n rows that take part, the ⌊fraction · n⌋ with the highest losses are removed; among equal
    losses the later row. A row whose loss is NaN counts as one of the highest.

    Wrong labels have a high loss once the right ones are learned. In the first steps all losses are
    high, so begin with ``scheduled(trim_losses, fraction=linear(0.3, 1000, init_value=0))`` or
    `late`. Rare and hard samples also have high losses, and are removed with the wrong ones.

    Args:
        fraction: The fraction of the rows to remove, in [0, 1); about that of the wrong labels.

    Needs: rows with losses; with several ranks the rows of all, so put it behind `across_ranks`.
    Publishes: ``accepted`` (M,) bool. Cost: nothing but a sort of the losses; no pass, no state.

    Raises:
        ValueError: fraction outside [0, 1). At the call: the losses are not known.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = gf.DenseStack({"w": torch.ones(4, 1)}, losses=torch.tensor([0.1, 3.0, 0.2, 0.3]))
        >>> gf.trim_losses(0.25).update(rows, {}, {"w": torch.zeros(1)})[2]["accepted"]
        tensor([ True, False,  True,  True])

    References:
        Shen, Sanghavi, "Learning with Bad Training Data via Iterative Trimmed Loss Minimization",
        2019, https://arxiv.org/abs/1810.11874
    """
    check_number(
        "trim_losses",
        "fraction",
        fraction,
        low=0,
        high=1,
        open_high=True,
        fix="0.1 removes a tenth.",
    )

    def update(
        rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[GradStack, State, Out]:
        losses = losses_of("trim_losses", rows, "another filter")
        live = rows.live
        high = torch.where(losses.isnan(), torch.inf, losses)
        # First the live rows by their loss, then the others.
        order = high.argsort(stable=True)
        order = order[(~live)[order].to(torch.uint8).argsort(stable=True)]
        place = order.argsort()
        # 0.29 · 100 is a little less than 29.
        removed = (live.sum() * fraction + 1e-9).floor()
        accepted = live & (place < live.sum() - removed)
        return rows.scaled(accepted.to(torch.float32)), state, {"accepted": accepted}

    return transform_in_context("trim_losses", "rows -> rows", update, publishes=("accepted",))


def losses_of(name: str, rows: GradStack, other: str) -> Tensor:
    """Return the losses of the rows (M,), or refuse rows without them."""
    losses = rows.losses
    if losses is None:
        raise ValueError(
            f"{name}: expected rows with losses, found none. Take the rows from microbatch_grads, "
            f"give DenseStack(rows, losses=...), or use {other}."
        )
    return losses


def _check_word(caller: str, argument: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"{caller}: expected {argument} as one of {known}, found {value!r}. The default is "
            f"{known[0]!r}."
        )
