"""Clip rows: each to a norm, or all of them to a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._row_rules import RowRules
from gradfilter._state_rules import Observing
from gradfilter._types import Context, Out, Params, State, Transform
from gradfilter.grads._joined_stacks import join
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._clipping import shrinking
from gradfilter.transforms._consensus import cosines_with_others
from gradfilter.transforms._transform import (
    check_number,
    is_off,
    transform_in_context,
)

# --- Clip each row ---


@dataclass(frozen=True)
class Quantile:
    """A limit that follows a quantile of the norms of earlier steps, made by `quantile`.

    Attributes:
        level: The level q of the quantile.
        decay: The weight of the old limit.
    """

    level: float
    decay: float

    def init(self, params: Params, count: int) -> State:
        """Return the limits before the first step; ``count`` of them, or () for 0."""
        first, device = next(iter(params.values())), _tree.device_of(params)
        shape = (count,) if count else ()
        dtype = _tree.at_least_float32(first).dtype
        return {
            "limit": torch.zeros(shape, dtype=dtype, device=device),
            "count": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def limit(self, state: State) -> Tensor:
        """Return the limits of this step, Inf before the first norms."""
        limit: Tensor = torch.where(state["count"] > 0, state["limit"], torch.inf)
        return limit

    def observe(self, state: State, norms: Tensor) -> State:
        """Return the state after the norms of all rows; NaN for a row that does not count."""
        found = _products.known_quantile(norms, self.level).to(state["limit"].dtype)
        old, known = state["limit"], found.isfinite()
        moved = torch.where(state["count"] > 0, old + (found - old) * (1 - self.decay), found)
        return {
            "limit": torch.where(known, moved, old),
            "count": state["count"] + known.to(torch.int64),
        }


def quantile(level: float, *, decay: float = 0.9) -> Quantile:
    """Make a limit for `clip_per_row` that follows a quantile of the row norms.

    C ← decay · C + (1 − decay) · quantile_q(‖g_1‖, ..., ‖g_M‖), over the norms that are finite and
    above 0, starting from the quantile of the first step. The limit of a step comes from the steps
    before it, so the first step is not clipped, and the rows may come in parts.

    Andrew et al. move C by a factor exp(−η (b − q)), because with differential privacy they see
    only a noisy fraction b of rows below C. Here the quantile itself is known.

    Args:
        level: q in [0, 1]: 0.5 for the median.
        decay: The weight of the old limit, in [0, 1).

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> clip, params = gf.clip_per_row(gf.quantile(0.5, decay=0)), {"w": torch.zeros(1)}
        >>> state, rows = clip.init(params), {"w": torch.tensor([[1.0], [2.0], [9.0]])}
        >>> for _ in range(2):
        ...     clipped, state, _ = clip.update(rows, state, params)
        ...     clipped.sq_norms().sqrt()
        tensor([1., 2., 9.], dtype=torch.float64)
        tensor([1., 2., 2.], dtype=torch.float64)

    References:
        Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive
        Clipping", 2021, https://arxiv.org/abs/1905.03871
    """
    check_number("quantile", "level", level, low=0, high=1, fix="0.5 is the median.")
    check_number("quantile", "decay", decay, low=0, high=1, open_high=True, fix="0.9 is usual.")
    return Quantile(level, decay)


@factory
def clip_per_row(
    max_norm: float | Quantile | Literal["smallest"], *, per_leaf: bool = False
) -> Transform:
    """Scale every row to a norm of at most ``max_norm``.

    g_i ← g_i · min(1, C / ‖g_i‖), the norm over all leaves. A row that is not finite is not
    changed; finite_filter removes it.

    Args:
        max_norm: The limit C: a number above 0; or `quantile(0.5)`, which follows the norms of
            earlier steps; or "smallest", the smallest norm above 0 among the rows of the step, so
            that all rows but zero rows get one length (microbatch clipping).
        per_leaf: True to clip each leaf of a row separately: to C/√L for a number C and L leaves,
            so that the whole row still has a norm of at most C, or to the quantile or the smallest
            of the norms of this leaf.

    Needs: rows. Publishes: ``norm`` (M,) before clipping, or (M, L) in the order of the parameters;
    ``clipped_fraction`` ().

    State: none; with a quantile the limits, which observe skipped steps as well. Cost: the norms of
    the rows, with ``per_leaf`` of each leaf; no pass.

    Raises:
        ValueError: max_norm <= 0, or another word than "smallest".

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, {"w": torch.zeros(2)}
        >>> gf.clip_per_row(1.0).update(rows, {}, params)[0].sq_norms()
        tensor([1.0000, 0.2500], dtype=torch.float64)

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016,
        https://arxiv.org/abs/1607.00133
        Wang, "Revisit Micro-batch Clipping: Adaptive Data Pruning via Gradient Manipulation", 2024,
        https://arxiv.org/abs/2408.16204
    """
    if isinstance(max_norm, str):
        if max_norm != "smallest":
            raise ValueError(
                'clip_per_row: expected max_norm as a number, quantile(...) or "smallest", found '
                f"{max_norm!r}. 1.0 is a good start."
            )
    elif not isinstance(max_norm, Quantile):
        check_number(
            "clip_per_row", "max_norm", max_norm, low=0, open_low=True, fix="1.0 is a good start."
        )
    clip = _RowClip(max_norm, per_leaf)
    made = transform_in_context(
        "clip_per_row",
        "rows -> rows",
        clip,
        init=clip.init,
        publishes=("norm", "clipped_fraction"),
        row_rules=None
        if max_norm == "smallest"
        else RowRules(
            {"norm": "rows", "clipped_fraction": "mean"},
            observe=clip.observe if isinstance(max_norm, Quantile) else None,
        ),
    )
    return replace(made, rules=Observing()) if isinstance(max_norm, Quantile) else made


@dataclass(frozen=True, eq=False)
class _RowClip:
    """The computation of `clip_per_row`, with its arguments."""

    max_norm: float | Tensor | Quantile | Literal["smallest"]
    per_leaf: bool

    def init(self, params: Params) -> State:
        if not isinstance(self.max_norm, Quantile):
            return {}
        return self.max_norm.init(params, len(params) if self.per_leaf else 0)

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[GradStack, State, Out]:
        leaves = [rows.columns([name]) for name in params] if self.per_leaf else []
        sq_norms = torch.stack([leaf.sq_norms() for leaf in leaves], 1) if leaves else None
        norms = (rows.sq_norms() if sq_norms is None else sq_norms).sqrt()
        factors = shrinking(norms, self._limit(norms, state))
        # A factor of 0 would remove the row from means.
        factors = factors.clamp(min=torch.finfo(factors.dtype).tiny)
        out = {"norm": norms, "clipped_fraction": (factors < 1).to(norms.dtype).mean()}
        if isinstance(self.max_norm, Quantile):
            state = self.observe(state, out)
        if not leaves:
            return rows.scaled(factors), state, out
        each = zip(leaves, factors.unbind(1), strict=True)
        return join(*(leaf.scaled(own) for leaf, own in each)), state, out

    def _limit(self, norms: Tensor, state: State) -> Tensor | float:
        """Return the largest norm of this step: () of rows, (L,) of the leaves of a row."""
        limit = self.max_norm
        if isinstance(limit, Quantile):
            return limit.limit(state)
        if isinstance(limit, str):
            return torch.where(_counts(norms), norms, torch.inf).amin(0)
        return limit / math.sqrt(norms.shape[1]) if self.per_leaf else limit

    def observe(self, state: State, out: Mapping[str, Tensor]) -> State:
        """Return the state after the norms of all rows."""
        assert isinstance(self.max_norm, Quantile)
        norms = out["norm"]
        return self.max_norm.observe(state, torch.where(_counts(norms), norms, torch.nan))


def _counts(norms: Tensor) -> Tensor:
    """Return a mask of the norms of rows that take part and have something to learn from."""
    return norms.isfinite() & (norms > 0)


@factory
def normalize_rows(gamma: float = 0.01) -> Transform:
    """Give all rows almost the same length, without a threshold to choose.

    g_i ← g_i / (‖g_i‖ + γ). A row much longer than γ gets the norm 1, one much shorter keeps its
    direction and becomes g_i/γ. With γ = 0 every row has the norm 1. A zero row stays zero. A row
    that is not finite is not changed; finite_filter removes it.

    The lengths of the rows no longer count, so the learning rate has to be chosen anew.

    Args:
        gamma: γ >= 0. The paper has 0.01, and shows that a positive γ makes the rule converge.

    Needs: rows. Publishes: ``norm`` (M,) before. Cost: the norms of the rows; no pass, no state.

    Raises:
        ValueError: gamma < 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, {"w": torch.zeros(2)}
        >>> gf.normalize_rows(0).update(rows, {}, params)[0].sq_norms()
        tensor([1., 1.], dtype=torch.float64)

    References:
        Bu, Wang, Zha, Karypis, "Automatic Clipping: Differentially Private Deep Learning Made
        Easier and Stronger", 2023, https://arxiv.org/abs/2206.07136
    """
    check_number("normalize_rows", "gamma", gamma, low=0, fix="The paper has 0.01.")

    def update(
        rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[GradStack, State, Out]:
        norms = rows.sq_norms().sqrt()
        lengths = norms + gamma
        usable = lengths.isfinite() & (lengths > 0)
        factors = torch.where(usable, 1 / torch.where(usable, lengths, 1.0), 1.0)
        return rows.scaled(factors), state, {"norm": norms}

    return transform_in_context(
        "normalize_rows",
        "rows -> rows",
        update,
        publishes=("norm",),
        row_rules=RowRules({"norm": "rows"}),
    )


# --- Budget clipping: the rows of a batch share a limited sum of norms by their agreement ---


LEAST_SHARE = 1e-3
"""The smallest cosine used for a row; such a row gets what the others do not use."""


@factory
def budget_clip(budget: float = 0.3, *, power: float = 3.0) -> Transform:
    r"""Limit the mean norm of the rows, and give rows that agree a larger share.

    With n_i = ‖g_i‖, their mean m, and b = budget · (m of the first step):

        m <= b:  g_i ← g_i
        m > b:   g_i ← g_i · min(1, c·φ_i / n_i),  φ_i = max(s_i, 0.001)^power,

    with c such that the mean of the new norms is b²/m. s_i is the cosine of row i with the sum of
    the other unit rows, as in `consensus_filter`.

    When correct labels are learned, the mean norm falls below the budget, and the gradients are no
    longer changed. Wrong labels keep the mean norm high. Then the allowed mean b²/m is small,
    smaller with more wrong rows, and the rows that agree get most of it.

    On scikit-learn's digits, before mean_rows, sgd(0.2, momentum=0.9) and ema_params(0.99), the
    rows per sample, a small network ends at 98.3, 96.5 and 94.4 % with 0, 30 and 50 % wrong
    labels; plain training, at the best rate for each of the first two, at 98.1 and 94.4 %
    (`benchmarks/label_noise.py`). No other task was tried.

    Args:
        budget: The allowed fraction of the mean row norm of the first step, above 0.
        power: At least 0. A larger power favours rows that agree. At 0 nothing is compared, every
            row has the same limit, and the cost is that of `clip_per_row`.

    Needs: rows; with several ranks the rows of all, so put it behind `across_ranks`. The state is
    one number, the mean norm of the first step that was not skipped.

    Publishes: ``norm`` (M,) before clipping, ``clipped_fraction`` (), ``allowed`` (), the allowed
    mean of the norms (Inf if m <= b), and with a power ``cosine`` (M,): s, NaN for a row that is
    not finite. Such a row is not changed, and does not count in the means.

    Raises:
        ValueError: budget <= 0 or power < 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[3.0], [1.0]])}, {"w": torch.zeros(1)}
        >>> clip = gf.budget_clip(0.5, power=0)  # mean norm 2: at most 0.5 is left of it
        >>> clip.update(rows, clip.init(params), params)[0].sq_norms().sqrt()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    fix = "It is a fraction of the mean row norm of the first step; 0.3 is a good start."
    check_number("budget_clip", "budget", budget, low=0, open_low=True, fix=fix)
    check_number("budget_clip", "power", power, low=0, fix="3 is a good start, 0 compares nothing.")

    def init(params: Params) -> State:
        # Use the parameters' precision, not torch's default.
        first = _tree.at_least_float32(next(iter(params.values())))
        return {"first": torch.zeros((), dtype=first.dtype, device=_tree.device_of(params))}

    def update(
        rows: GradStack, state: State, params: Params, context: Context
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
        # A factor of 0 would remove the row from means, but a short row still counts in M.
        factors = factors.clamp(min=torch.finfo(factors.dtype).tiny)
        out = {
            "norm": sq_norms.sqrt(),
            "clipped_fraction": clipped.to(norms.dtype).mean(),
            "allowed": torch.where(over, allowed, torch.inf),
            **published,
        }
        return rows.scaled(factors), {"first": first}, out

    return transform_in_context(
        "budget_clip",
        "rows -> rows",
        update,
        init=init,
        publishes=("norm", "clipped_fraction", "allowed", *([] if is_off(power) else ["cosine"])),
    )


def _shares(
    rows: GradStack, params: Params, power: float | Tensor, usable: Tensor, norms: Tensor
) -> tuple[Tensor, Out]:
    """Compute φ, 0 for rows that take no part, and the cosines if requested."""
    if is_off(power):
        return usable.to(norms.dtype), {}
    cosine, compared = cosines_with_others(rows, params)
    shares = cosine.clamp(min=LEAST_SHARE).to(norms.dtype) ** power
    return torch.where(usable, shares, 0.0), {"cosine": torch.where(compared, cosine, torch.nan)}


def _level(norms: Tensor, shares: Tensor, total: Tensor) -> Tensor:
    """Compute the level c with Σ min(n_i, c·φ_i) = total, which is less than Σ n_i.

    Rows get their norm in the order of n_i/φ_i. The first row that cannot get all of its norm, and
    all rows after it, divide the rest by their shares.
    """
    part = shares > 0
    full_at, order = torch.where(part, norms / torch.where(part, shares, 1.0), 0.0).sort()
    norms, shares = norms[order], shares[order]
    filled = norms.cumsum(0) - norms
    # Sum from the end: a difference of two sums would lose small shares next to large ones.
    waiting = shares.flip(0).cumsum(0).flip(0)
    levels = (total - filled) / torch.where(waiting > 0, waiting, 1.0)
    short = (levels <= full_at) & (waiting > 0)
    # If no row is limited because of rounding, nothing is clipped.
    first = levels.gather(0, short.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)
    return torch.where(short.any(), first, torch.inf)
