"""Clip gradients, or skip steps, that stand out from those of the steps before.

Both transforms observe: their memory also takes in the steps that were skipped. Otherwise a lasting
change of the level would be rejected for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._scaled_tree import ScaledTree
from gradfilter._shards import is_sharded
from gradfilter._state_rules import Observing
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.transforms._clipping import unit_norms
from gradfilter.transforms._transform import check_number, check_whole, transform_in_context

# --- Clip what stands out: ZClip for the whole gradient, AdaGC leaf by leaf ---


@factory
def spike_clip(
    z: float = 2.5,
    *,
    decay: float = 0.97,
    warmup: int = 25,
    factor: float | None = None,
    per_leaf: bool = False,
    warmup_norm: float | None = None,
) -> Transform:
    r"""Shorten a gradient that is much longer than those of the steps before (ZClip, AdaGC).

    With the norm n = ‖g‖ and the moving mean μ and variance σ² of the norms so far:

        n > μ + z σ:   g ← g · (μ + z² σ² / (n − μ)) / n      (ZClip)
        with factor:   g ← g · min(1, factor · μ / n)         (AdaGC)

    ZClip's limit falls from μ + z σ towards μ, the longer the gradient is. Then the memory takes in
    the clipped norm n: μ ← decay μ + (1 − decay) n, σ² ← decay σ² + (1 − decay) (n − μ)². In the
    first ``warmup`` steps μ and σ² are the mean and the variance of the norms so far (with a
    factor, μ is the smallest of them, as in AdaGC), and nothing is clipped, or with
    ``warmup_norm`` C the whole gradient before its norm, or those of its leaves, are taken in:

        g ← g · min(1, C / ‖g‖),  with ``per_leaf`` also by the norm over all leaves

    ZClip is the default. AdaGC is ``spike_clip(factor=1.05, decay=0.98, warmup=100,
    per_leaf=True, warmup_norm=1.0)``. ZClip's authors clip to no fixed norm in the warm-up.

    Args:
        z: The number of standard deviations above the mean that is not clipped, above 0.
        decay: The weight of the old mean and variance, in [0, 1).
        warmup: The number of first steps that only fill the memory, at least 1.
        factor: AdaGC's factor, above 0, in place of z: 1.05 in the paper. None for ZClip.
        per_leaf: True to have a memory and a limit for each leaf of the gradient.
        warmup_norm: C above 0, the largest norm of the whole gradient in the warm-up. None not to
            clip there.

    Publishes: ``norm`` () before clipping, or (leaves,) in the order of the parameters;
    ``clipped_fraction`` (), of the leaves with ``per_leaf``; ``mean``, μ before the step, of the
    shape of ``norm``.

    A norm that is not finite is not clipped and not remembered; `finite_filter` skips such a step.
    If the norms rise for good, ZClip keeps clipping them to about the old mean, because it
    remembers the clipped norms; with a factor, μ follows them.

    State: μ, σ² and the number of norms; it observes, so that steps skipped by other transforms
    count. A norm of one leaf that is not finite does not count for this leaf, so its warm-up is
    longer; ``warmup_norm`` clips no leaf of such a gradient. Cost: the norms of one gradient; no
    pass, no question to the rows.

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> clip, params = gf.spike_clip(warmup=2), {"w": torch.zeros(1)}
        >>> state = clip.init(params)
        >>> for length in (1.0, 3.0, 3.0, 90.0):
        ...     grads, state, out = clip.update({"w": torch.tensor([length])}, state, params)
        ...     grads["w"]
        tensor([1.])
        tensor([3.])
        tensor([3.])
        tensor([2.1009])

    References:
        Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
        https://arxiv.org/abs/2504.02507
        Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping",
        2025, https://arxiv.org/abs/2502.11034
    """
    check_number("spike_clip", "z", z, low=0, open_low=True, fix="ZClip has 2.5.")
    check_number("spike_clip", "decay", decay, low=0, high=1, open_high=True, fix="ZClip has 0.97.")
    check_whole("spike_clip", "warmup", warmup, low=1, fix="ZClip has 25.")
    if factor is not None:
        check_number(
            "spike_clip", "factor", factor, low=0, open_low=True, fix="AdaGC has 1.05, ZClip None."
        )
    if warmup_norm is not None:
        fix = "AdaGC has 1.0, ZClip None."
        check_number("spike_clip", "warmup_norm", warmup_norm, low=0, open_low=True, fix=fix)
    clip = _SpikeClip(z, decay, warmup, factor, per_leaf, warmup_norm)
    made = transform_in_context(
        "spike_clip",
        "tree -> tree",
        clip,
        init=clip.init,
        publishes=("norm", "clipped_fraction", "mean"),
        row_rules=IGNORES_ROWS,
    )
    return replace(made, rules=Observing()).with_scaling(clip.scaling)


@dataclass(frozen=True, eq=False)
class _SpikeClip:
    """The computation of `spike_clip`, with its arguments."""

    z: float | Tensor
    decay: float | Tensor
    warmup: int
    factor: float | Tensor | None
    per_leaf: bool
    warmup_norm: float | Tensor | None

    def init(self, params: Params) -> State:
        """Return the memory of no norm."""
        first = next(iter(params.values()))
        shape, device = ((len(params),) if self.per_leaf else ()), _tree.device_of(params)
        zeros = torch.zeros(shape, dtype=_tree.at_least_float32(first).dtype, device=device)
        state = {"count": torch.zeros(shape, dtype=torch.int64, device=device), "mean": zeros}
        return state if self.factor is not None else {**state, "variance": zeros.clone()}

    def __call__(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        clipped, state, out = self.scaling(grads, state, params, context)
        return clipped.wide(grads), state, out

    def scaling(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[ScaledTree, State, Out]:
        """Do the same as a call, and leave the products to the reader of the result."""
        norms = leaf_norms(grads) if self.per_leaf else _products.norm(grads)
        norms = norms.to(state["mean"].dtype)
        warm = state["count"] >= self.warmup
        limits = torch.where(warm, self._limits(norms, state), self._warmup_limits(norms))
        over = (norms > limits) & norms.isfinite()
        shrunk = torch.where(over, limits, norms)
        factors = torch.where(over, limits / torch.where(over, norms, 1.0), 1.0)
        out = {
            "norm": norms,
            "clipped_fraction": over.to(norms.dtype).mean(),
            "mean": state["mean"],
        }
        each = _FactorPerLeaf(grads, factors)
        return ScaledTree(grads, each), self._remembered(shrunk, state), out

    def _warmup_limits(self, norms: Tensor) -> Tensor:
        """Return what the norms are clipped to in the warm-up: one factor for all leaves."""
        if self.warmup_norm is None:
            return torch.full_like(norms, torch.inf)
        whole = _products.norm({"norms": norms}).to(norms.dtype)
        over = (whole > self.warmup_norm) & whole.isfinite()
        factor = torch.where(over, self.warmup_norm / torch.where(over, whole, 1.0), 1.0)
        return norms * factor

    def _limits(self, norms: Tensor, state: State) -> Tensor:
        """Return the largest norm that is not clipped; for a longer one, what it is clipped to."""
        mean: Tensor = state["mean"]
        if self.factor is not None:
            return mean * self.factor
        reach = self.z * state["variance"].sqrt()
        above = norms - mean
        over = above > reach
        limits: Tensor = torch.where(over, reach * reach / torch.where(over, above, 1.0), reach)
        return mean + limits

    def _remembered(self, norms: Tensor, state: State) -> State:
        """Return the memory with the norms after clipping; what is not finite is left out."""
        count, mean = state["count"], state["mean"]
        usable, warm = norms.isfinite(), count >= self.warmup
        number = count + 1
        # In the warm-up every norm has the same weight.
        fresh = torch.where(warm, torch.ones_like(mean) * (1 - self.decay), 1 / number)
        new_mean = mean + fresh * (norms - mean)
        new = {"count": number, "mean": new_mean}
        if self.factor is not None:
            smallest = torch.where(count == 0, norms, torch.minimum(mean, norms))
            new["mean"] = torch.where(warm, new_mean, smallest)
        else:
            variance = state["variance"]
            # (n − μ)² around the new mean, as published; in the warm-up Welford's way to the
            # variance of all norms.
            spread = (norms - new_mean) * torch.where(warm, norms - new_mean, norms - mean)
            new["variance"] = variance + fresh * (spread - variance)
        return {name: torch.where(usable, value, state[name]) for name, value in new.items()}


@dataclass(frozen=True, eq=False)
class _FactorPerLeaf:
    """The factors of some leaves, from one factor () for all or one for each leaf (leaves,)."""

    grads: Tree
    factors: Tensor

    def __call__(self, names: Collection[str]) -> Tree:
        wide = {n: _tree.at_least_float32(self.grads[n]).dtype for n in names}
        if not self.factors.ndim:
            return {n: self.factors.to(dtype) for n, dtype in wide.items()}
        each = dict(zip(self.grads, self.factors.unbind(), strict=True))
        return {n: each[n].to(dtype) for n, dtype in wide.items()}


def leaf_norms(tree: Tree) -> Tensor:
    """Compute the norm of every leaf, over all ranks where leaves are sharded. (leaves,)."""
    if any(map(is_sharded, tree.values())):
        return torch.stack([_products.norm({name: leaf}) for name, leaf in tree.items()])
    return unit_norms(tree, {name: list(range(leaf.ndim)) for name, leaf in tree.items()})


# --- Skip steps that stand out ---


Quantity = Literal["norm", "loss"]

REMEMBERED = 3.0
"""A spike is remembered as at most so many times the allowed distance from the mean.

One huge spike would otherwise hide all others until it leaves the window. With this number a level
that jumps to the hundredfold is accepted after 13 steps at most.
"""


@factory
def spike_skip(
    window: int = 128,
    *,
    sigmas: float = 6.0,
    of: Quantity | Sequence[Quantity] = ("norm", "loss"),
    max_consecutive: int | None = 20,
) -> Transform:
    r"""Skip a step whose gradient norm or loss is far above those of the last steps.

    With the mean μ and the standard deviation σ of the last ``window`` values x of a quantity:

        keep = x <= μ + sigmas · σ      for every quantity

    Nothing is skipped until half the window is filled. Values of skipped steps are remembered, at
    most as μ + 3 sigmas · σ, so that a lasting change of the level is accepted after a few steps. A
    value that is not finite is a spike, and is not remembered.

    After ``max_consecutive`` spikes in a row the transform gives up: ``gave_up`` becomes true and
    remains so. The training then needs other measures, such as a smaller learning rate from an
    earlier checkpoint. `interop.Filtered`, the trainers and ``gradfilter train`` raise an error.

    Args:
        window: The number of values of each quantity to remember, at least 2.
        sigmas: The allowed distance from the mean in standard deviations, above 0.
        of: "norm": the norm of the gradient that arrives. "loss": the mean loss of the rows; in a
            chain without rows, the keyword ``loss`` of the step. Or both.
        max_consecutive: The number of spikes in a row, at least 1, at which to give up. None to go
            on for ever.

    Needs: for "loss", rows with losses, or ``loss=``. Publishes: ``keep`` (), ``spike`` () bool,
    ``consecutive`` (), the number of spikes in a row; ``gave_up`` () bool; and for each quantity
    its value and its limit: ``norm``, ``norm_limit``, ``loss``, ``loss_limit`` (). A limit is Inf
    while nothing is skipped.

    State: the window of each quantity; it observes. Cost: the norm of one gradient; no pass.

    Raises:
        ValueError: A number out of range, or an unknown quantity. At the call: there is no loss.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.spike_skip(4, of="norm"), gf.sgd(1.0))
        >>> params = {"w": torch.zeros(1)}
        >>> state = update.init(params)
        >>> for slope in (1.0, 1.1, 0.9, 50.0, 1.0):
        ...     grads = {"w": torch.tensor([slope])}
        ...     params, state, info = update(params, state, grads)
        ...     print(info["keep"].item(), params["w"])
        True tensor([-1.])
        True tensor([-2.1000])
        True tensor([-3.])
        False tensor([-3.])
        True tensor([-4.])

    References:
        Groeneveld et al., "OLMo: Accelerating the Science of Language Models", 2024,
        https://arxiv.org/abs/2402.00838, whose successors skip steps by this rule.
    """
    check_whole("spike_skip", "window", window, low=2, fix="128 is usual.")
    check_number("spike_skip", "sigmas", sigmas, low=0, open_low=True, fix="6 is usual.")
    if max_consecutive is not None:
        fix = "None never gives up."
        check_whole("spike_skip", "max_consecutive", max_consecutive, low=1, fix=fix)
    quantities = (of,) if isinstance(of, str) else tuple(of)
    known = get_args(Quantity)
    if not quantities or not {*quantities} <= {*known} or len({*quantities}) < len(quantities):
        raise ValueError(
            f"spike_skip: expected of= as some of {known}, each once, found {of!r}. The default "
            "watches both."
        )
    skip = _SpikeSkip(window, sigmas, quantities, max_consecutive)
    made = transform_in_context(
        "spike_skip",
        "tree -> tree",
        skip,
        init=skip.init,
        publishes=(
            *("keep", "spike", "consecutive", "gave_up"),
            *(name for q in quantities for name in (q, f"{q}_limit")),
        ),
        row_rules=None if "loss" in quantities else IGNORES_ROWS,
    )
    return replace(made, rules=Observing())


@dataclass(frozen=True, eq=False)
class _SpikeSkip:
    """The computation of `spike_skip`, with its arguments."""

    window: int
    sigmas: float | Tensor
    quantities: tuple[Quantity, ...]
    max_consecutive: int | None

    def init(self, params: Params) -> State:
        """Return empty windows."""
        first, device = next(iter(params.values())), _tree.device_of(params)
        number = torch.zeros((), dtype=torch.int64, device=device)
        dtype = _tree.at_least_float32(first).dtype
        values = torch.zeros(self.window, dtype=dtype, device=device)
        return {
            **{q: {"values": values.clone(), "count": number.clone()} for q in self.quantities},
            "consecutive": number,
            "gave_up": torch.zeros((), dtype=torch.bool, device=device),
        }

    def __call__(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        new: dict[str, Any] = {}
        found: Out = {}
        spikes: list[Tensor] = []
        for quantity in self.quantities:
            value = _products.norm(grads) if quantity == "norm" else _loss(context)
            value = value.to(state[quantity]["values"])
            spike, limit, new[quantity] = self._judged(value, state[quantity])
            spikes.append(spike)
            found |= {quantity: value, f"{quantity}_limit": limit}
        spike = torch.stack(spikes).any()
        consecutive = torch.where(spike, state["consecutive"] + 1, 0)
        gave_up = state["gave_up"]
        if self.max_consecutive is not None:
            gave_up = gave_up | (consecutive >= self.max_consecutive)
        new |= {"consecutive": consecutive, "gave_up": gave_up}
        out = {"keep": ~spike, "spike": spike, "consecutive": consecutive, "gave_up": gave_up}
        return grads, new, out | found

    def _judged(self, value: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor, State]:
        """Return whether a value is a spike, the limit, and the memory with it."""
        values, count = memory["values"], memory["count"]
        places = torch.arange(self.window, device=values.device)
        known = places < count
        number = known.sum()
        mean = torch.where(known, values, 0.0).sum() / number.clamp(min=1)
        squares = torch.where(known, values - mean, 0.0).square().sum()
        deviation = (squares / (number - 1).clamp(min=1)).sqrt()
        ready = count >= max(2, self.window // 2)
        limit = torch.where(ready, mean + self.sigmas * deviation, torch.inf)
        finite = value.isfinite()
        spike = ~finite | (value > limit)
        most = mean + REMEMBERED * self.sigmas * deviation
        # Values that are all equal say nothing about the deviation.
        remembered = torch.where(spike & (deviation > 0), torch.minimum(value, most), value)
        here = (places == count % self.window) & finite
        values = torch.where(here, remembered, values)
        return spike, limit, {"values": values, "count": count + finite.to(count.dtype)}


def _loss(context: Context) -> Tensor:
    """Return the mean loss of the rows, or the caller's."""
    rows, given = context.rows, context.values.get("loss")
    loss = given if rows is None else rows.mean_loss()
    if not isinstance(loss, Tensor) or loss.ndim:
        found = "none" if loss is None else f"{type(loss).__name__}"
        raise ValueError(
            "spike_skip: expected the loss of the step, from rows of microbatch_grads or as the "
            f"keyword loss=, a tensor of shape (), found {found}. Give it, or write "
            'spike_skip(of="norm").'
        )
    return loss
