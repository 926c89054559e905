"""Plain reducers (the mean, any function of the Gram, agreement in sign) and `finite_filter`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import RowRules
from gradfilter._shards import whole
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._transform import check_number, transform_in_context

# --- Reducers ---


def mean_weights(rows: GradStack) -> Tensor:
    """Return equal weights of the rows that take part, with sum 1 (0 if there are none). (M,)."""
    live = rows.live.to(_tree.sum_dtype(rows.live))
    return live / live.sum().clamp(min=1)


def shares(excess: Tensor) -> Tensor:
    """Return numbers >= 0 divided by their sum; zeros if all are zero. (M,)."""
    # Divide by the largest first, so that the sum does not underflow; then it is at least 1.
    largest = excess.max()
    excess = excess / torch.where(largest > 0, largest, 1.0)
    return excess / excess.sum().clamp(min=1)


@factory
def mean_rows() -> Transform:
    """Combine the rows by their mean, as in ordinary training.

    A row that is not finite makes the mean not finite, unless a finite_filter before it removed the
    row; then the mean is over the others.

    Needs: rows. Publishes: ``weights`` (M,).

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0], [3.0]])}
        >>> gf.mean_rows().update(rows, {}, {"w": torch.zeros(1)})[0]
        {'w': tensor([2.])}
    """

    def update(
        rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        weights = mean_weights(rows)
        return rows.combine(weights), state, {"weights": weights}

    return transform_in_context(
        "mean_rows",
        "rows -> tree",
        update,
        publishes=("weights",),
        row_rules=RowRules({"weights": "shares"}, divisor=_live_count),
    )


def _live_count(rows: GradStack) -> Tensor:
    return rows.live.sum()


@factory
def aggregate(
    weighting: Callable[..., Any],
    init: State | Callable[[Params], State] | None = None,
) -> Transform:
    """Combine the rows with weights that any function computes from their Gram.

    grads = wᵀ J with w = weighting(J Jᵀ). TorchJD's Gram-based weightings (UPGrad, MGDA, CAGrad,
    Krum and others) can be used directly; UPGrad needs the solver of
    ``torchjd[quadprog_projector]``.

    With ``init`` the weighting has a memory: ``w, state = weighting(J Jᵀ, state)``. A skipped step
    leaves the state as it was.

    Args:
        weighting: (M, M) -> (M,), a pure function; with ``init`` (M, M), state -> (M,), state. Some
            libraries' weightings read values on the host; the step then waits for the device, and
            does not compile as one graph.
        init: The first state, a tensor or a nested dict of tensors with the entries, shapes and
            dtypes of every later one, or a function of the parameters that gives it. The number of
            rows is not known to `chain`: a memory of M numbers says it itself, as in
            ``torch.full((8,), 1 / 8)``. None for a weighting without memory.

    Needs: rows. Publishes: ``weights`` (M,).

    Raises:
        TypeError: The weighting is not callable, or carries state between calls (a ``reset``
            method, parameters or buffers), which a pure step cannot keep. ``init`` has something
            else than tensors. With ``init``, the weighting does not return a pair.
        ValueError: It returns a shape other than (M,).

    Examples:
        >>> import torch, gradfilter as gf
        >>> shortest = gf.aggregate(lambda gram: (1 / gram.diagonal()).softmax(0))
        >>> rows, params = {"w": torch.tensor([[1.0], [9.0]])}, {"w": torch.zeros(1)}
        >>> shortest.update(rows, {}, params)[2]["weights"].argmax().item()
        0
        >>> def slowly(gram, average):  # equal norms on average over steps
        ...     average = 0.9 * average + 0.1 * gram.diagonal()
        ...     return 1 / average.sqrt(), average
        >>> balanced = gf.aggregate(slowly, init=torch.ones(2))
        >>> balanced.update(rows, balanced.init(params), params)[1]
        {'weighting': tensor([1., 9.])}

    References:
        Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", 2024,
        https://arxiv.org/abs/2406.16232
    """
    if not callable(weighting):
        raise TypeError(
            f"aggregate: expected a function (M, M) -> (M,), found {type(weighting).__name__}."
        )
    stateful = callable(getattr(weighting, "reset", None)) or (
        isinstance(weighting, nn.Module) and bool(weighting.state_dict())
    )
    if stateful:
        raise TypeError(
            f"aggregate: expected a pure weighting, found {type(weighting).__name__}, which keeps "
            "state between calls: a skipped step could not be undone. Use a stateless weighting, "
            "or write it as a function weighting(gram, state) -> (weights, state) and give its "
            "first state: aggregate(weighting, init=...)."
        )
    if init is None:
        return transform_in_context(
            "aggregate", "rows -> tree", _Weighted(weighting), publishes=("weights",)
        )
    if not callable(init):
        _check_memory(init)
    return transform_in_context(
        "aggregate",
        "rows -> tree",
        _WeightedWithMemory(weighting),
        init=_FirstMemory(init),
        publishes=("weights",),
    )


def _check_memory(memory: Any) -> None:
    for leaf in _tree.leaves(memory):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                "aggregate: expected init as a tensor, a nested dict of tensors, or a function of "
                f"the parameters that gives one, found {type(leaf).__name__}. Keep numbers as "
                "tensors of shape ()."
            )


@dataclass(frozen=True, eq=False)
class _FirstMemory:
    """The first state of a weighting with a memory, on the device of the parameters."""

    given: Any

    def __call__(self, params: Params) -> State:
        memory = self.given(params) if callable(self.given) else self.given
        _check_memory(memory)
        device = _tree.device_of(params)
        copy = partial(Tensor.to, device=device, copy=True)  # a donated state is written into
        return {"weighting": _tree.tree_map(copy, memory)}


@dataclass(frozen=True, eq=False)
class _Weighted:
    """The computation of `aggregate` without a memory."""

    weighting: Callable[[Tensor], Tensor]

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        weights = self.weighting(rows.gram())
        return _combined(rows, weights), state, {"weights": weights}


@dataclass(frozen=True, eq=False)
class _WeightedWithMemory:
    """The computation of `aggregate` with a memory."""

    weighting: Callable[[Tensor, Any], tuple[Tensor, Any]]

    def __call__(
        self, rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        found: Any = self.weighting(rows.gram(), state["weighting"])
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                "aggregate: expected weighting(gram, state) -> (weights, state), because init is "
                f"given, found {type(found).__name__}. Return both, or omit init."
            )
        weights, memory = found
        return _combined(rows, weights), {"weighting": memory}, {"weights": weights}


def _combined(rows: GradStack, weights: Tensor) -> Tree:
    """Combine the rows; refuse weights of another shape than (M,)."""
    if weights.shape != (len(rows),):
        raise ValueError(
            f"aggregate: expected weights of shape ({len(rows)},), found "
            f"{tuple(weights.shape)}. The weighting must give one number per row."
        )
    return rows.combine(weights)


@factory
def sign_agreement(fraction: float) -> Transform:
    """Keep a coordinate of the mean only if enough rows agree in its sign (the AND-mask).

    grads = mean_i(g_i) · [ |mean_i sign(g_i)| >= fraction ], coordinate by coordinate.

    Args:
        fraction: The required agreement, in [0, 1]; 0 keeps everything, 1 needs all rows.

    Needs: rows, which it materialises. Publishes: ``weights`` (M,) of the mean, and
    ``kept_fraction`` (), the fraction of the coordinates that is kept.

    Raises:
        ValueError: fraction outside [0, 1].

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows = {"w": torch.tensor([[1.0, 2.0], [3.0, -1.0]])}
        >>> gf.sign_agreement(1.0).update(rows, {}, {"w": torch.zeros(2)})[0]
        {'w': tensor([2., 0.])}

    References:
        Parascandolo, Neitz, Orvieto, Gresele, Schölkopf, "Learning explanations that are hard to
        vary", 2021, https://arxiv.org/abs/2009.00329
    """
    check_number("sign_agreement", "fraction", fraction, low=0, high=1, fix="1 asks for unanimity.")

    def update(
        rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        weights = mean_weights(rows)
        mean = rows.combine(weights)
        stacked = rows.stacked()
        count = rows.live.sum().clamp(min=1)
        # The sum is exact and the quotient is rounded once, so 3 of 5 reaches a fraction of 0.6.
        agree = {
            name: stacked[name].sign().to(torch.float32).sum(0).abs() / count >= fraction
            for name in mean
        }
        kept = torch.stack([whole(mask.sum()) for mask in agree.values()]).sum()
        total = sum(mask.numel() for mask in agree.values())
        # A value that is not finite has no sign, and must not be hidden as 0.
        grads = {n: torch.where(agree[n] | ~g.isfinite(), g, 0.0) for n, g in mean.items()}
        return grads, state, {"weights": weights, "kept_fraction": kept / total}

    return transform_in_context(
        "sign_agreement", "rows -> tree", update, publishes=("weights", "kept_fraction")
    )


# --- Guard against gradients that are not finite ---


@factory
def finite_filter() -> Transform:
    """Remove rows that are not finite; skip the step if none is left.

    On rows: such a row gets the factor 0, and every later transform treats it as absent. On a tree:
    gradients pass unchanged, and the step is skipped unless all are finite.

    Publishes: ``keep`` () (true if some row is finite; on a tree, if all entries are), ``finite``
    (M,) bool, or () on a tree. A row counts as finite if its squared norm is.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.finite_filter(), gf.mean_rows(), gf.sgd(1.0))
        >>> params = {"w": torch.zeros(1)}
        >>> rows = {"w": torch.tensor([[float("nan")], [2.0]])}
        >>> update(params, update.init(params), rows)[0]
        {'w': tensor([-2.])}
    """

    def update(
        grads: GradStack | Tree, state: State, params: Params, context: Context
    ) -> tuple[GradStack | Tree, State, Out]:
        if isinstance(grads, GradStack):
            norms = grads.sq_norms()
            finite = norms.isfinite()
            out = {"keep": (finite & grads.live).any(), "finite": finite}
            return grads.scaled(finite.to(norms.dtype)), state, out
        finite = torch.stack([whole(g.isfinite().all()) for g in grads.values()]).all()
        return grads, state, {"keep": finite, "finite": finite}

    return transform_in_context(
        "finite_filter",
        ("rows -> rows", "tree -> tree"),
        update,
        publishes=("keep", "finite"),
        row_rules=RowRules({"keep": "any", "finite": "rows"}),
    )
