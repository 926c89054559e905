"""Publish statistics of the rows of a step; the gradients pass unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._state_rules import Observing
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._every import every as in_every
from gradfilter.transforms._reducers import mean_weights
from gradfilter.transforms._transform import check_number, check_whole, transform_in_context


@factory
def watch(
    every: int = 1, *, decay: float = 0.99, quantiles: Sequence[float] = (0.1, 0.5, 0.9)
) -> Transform:
    r"""Publish how noisy, alike and large the rows are; gradients pass unchanged.

    Over the m rows that take part and are finite, with their mean ḡ:

        trΣ = (Σ ‖g_i‖² − m ‖ḡ‖²) / (m − 1),   ‖G‖² = ‖ḡ‖² − trΣ/m
        noise_scale = EMA(trΣ) / EMA(‖G‖²)
        cosine = Σ_{i≠j} ⟨g_i, g_j⟩ / Σ_{i≠j} ‖g_i‖ ‖g_j‖

    noise_scale is the number of rows above which more rows help little; times the samples per row
    it is the simple noise scale in samples. Numerator and denominator are averaged before they are
    divided, because each is very noisy. The cosine is the mean over all pairs of rows, weighted by
    their lengths.

    Put it behind the reducer, where it also sees the weights of the rows, or before it. The hosts
    of `gradfilter.interop` log its numbers as all other metrics: `FilteredModule` by Lightning's
    logger, `FilteredTrainer` by its callbacks (TensorBoard, Weights & Biases, ...).

    Args:
        every: The number of steps from one measurement to the next, at least 1. `info` has the
            metrics in those steps only.
        decay: The weight of the old averages of the noise scale, in [0, 1).
        quantiles: Levels of the quantiles of norms and losses, each in [0, 1].

    Needs: rows. Publishes, all (): ``noise_scale``, Inf while the noise hides the gradient;
    ``cosine``; ``effective_rows``, (Σ w)² / Σ w² with the weights of the reducer, else the number
    of rows that take part; ``accepted_fraction``, of the rows with a weight; ``norm_50`` and
    ``loss_50`` for the quantile 0.5, and so on; NaN where nothing is known.

    State: two averages; it observes skipped steps. Cost: the Gram if the stack has a cheap one,
    which a filter before it has asked for already; else norms and one ``combine``.

    Raises:
        ValueError: A number out of range. At the call: there are no rows.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.mean_rows(), gf.watch(), gf.sgd(0.1))
        >>> params = {"w": torch.zeros(2)}
        >>> rows = {"w": torch.tensor([[3.0, 1.0], [3.0, -1.0]])}  # trΣ = 2, ‖G‖² = 9 - 1
        >>> info = update(params, update.init(params), rows)[2]
        >>> shown = "noise_scale", "cosine", "norm_50"
        >>> [round(info[f"watch/{name}"].item(), 4) for name in shown]
        [0.25, 0.8, 3.1623]

    References:
        McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018,
        https://arxiv.org/abs/1812.06162
    """
    check_whole("watch", "every", every, low=1, fix="1 measures in every step.")
    check_number("watch", "decay", decay, low=0, high=1, open_high=True, fix="0.99 is usual.")
    for level in quantiles:
        check_number("watch", "quantiles", level, low=0, high=1, fix="0.5 is the median.")
    found = _Watch(decay, {_percent(level): level for level in quantiles})
    made = transform_in_context(
        "watch",
        ("rows -> rows", "tree -> tree"),
        found,
        init=found.init,
        publishes=(
            *("noise_scale", "cosine", "effective_rows", "accepted_fraction"),
            *(f"{of}_{name}" for of in ("norm", "loss") for name in found.levels),
        ),
    )
    made = replace(made, rules=Observing())
    return made if every == 1 else in_every(every, made)


def _percent(level: float) -> str:
    """Return the name of a quantile: 50 for 0.5, 2.5 without its dot, which joins names."""
    return f"{100 * level:g}".replace(".", "_")


@dataclass(frozen=True, eq=False)
class _Watch:
    """The computation of `watch`, with its arguments."""

    decay: float
    levels: dict[str, float]

    def init(self, params: Params) -> State:
        """Return averages of nothing, for which the division gives NaN."""
        dtype = _tree.at_least_float32(next(iter(params.values()))).dtype
        zero = torch.zeros((), dtype=dtype, device=_tree.device_of(params))
        return {"trace": zero, "sq_norm": zero.clone()}

    def __call__(
        self, grads: GradStack | Tree, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        rows = grads if isinstance(grads, GradStack) else context.rows
        if rows is None:
            raise ValueError(
                "watch: expected rows in the chain, found a gradient without them. Start the chain "
                "from the rows of microbatch_grads or per_sample_grads."
            )
        norms, usable, of_mean = _lengths(rows)
        count = usable.sum().to(norms.dtype)
        squares, total = norms.square().sum(), norms.sum()
        enough = count > 1
        trace = (squares - count * of_mean).clamp(min=0) / torch.where(enough, count - 1, 1.0)
        sq_norm = of_mean - trace / count.clamp(min=1)
        state = {
            name: torch.where(enough, old + (value.to(old.dtype) - old) * (1 - self.decay), old)
            for (name, old), value in zip(state.items(), (trace, sq_norm), strict=True)
        }
        pairs = total.square() - squares
        together = count.square() * of_mean - squares
        known = enough & (pairs > 0)
        cosine = torch.where(known, together / torch.where(known, pairs, 1.0), torch.nan)
        # On rows they are those of an earlier reducer, or of none.
        weights = None if isinstance(grads, GradStack) else context.weights
        weights = mean_weights(rows) if weights is None else weights
        spread = weights.square().sum()
        out = {
            "noise_scale": _ratio(state["trace"], state["sq_norm"]),
            "cosine": cosine,
            "effective_rows": weights.sum().square() / torch.where(spread > 0, spread, 1.0),
            "accepted_fraction": (weights != 0).to(norms.dtype).mean(),
            **self._quantiles("norm", torch.where(usable, norms, torch.nan)),
            **self._quantiles("loss", _known_losses(rows, norms)),
        }
        return grads, state, out

    def _quantiles(self, of: str, values: Tensor) -> Out:
        return {
            f"{of}_{name}": _products.known_quantile(values, level)
            for name, level in self.levels.items()
        }


def _lengths(rows: GradStack) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms (M,), 0 for unusable rows, the mask of the others, and ‖ḡ‖² ()."""
    gram = rows.gram() if rows.gram_is_cheap() else None
    squares = rows.sq_norms() if gram is None else gram.diagonal()
    usable = rows.live & squares.isfinite()
    count = usable.sum().clamp(min=1)
    norms = torch.where(usable, squares, 0.0).sqrt()
    if gram is not None:
        both = usable[:, None] & usable
        return norms, usable, torch.where(both, gram, 0.0).sum() / count.square()
    mean = rows.combine(usable.to(norms.dtype) / count)
    return norms, usable, _products.sq_norm(mean).to(norms.dtype)


def _known_losses(rows: GradStack, like: Tensor) -> Tensor:
    """Return the losses of the rows that take part, NaN for others and where none are known."""
    losses = rows.losses
    if losses is None:
        return torch.full_like(like, torch.nan)
    losses = losses.to(like.dtype)
    return torch.where(rows.live & losses.isfinite(), losses, torch.nan)


def _ratio(trace: Tensor, sq_norm: Tensor) -> Tensor:
    """Return trΣ/‖G‖²: Inf if the noise hides the gradient, NaN if nothing is known."""
    no_signal = torch.where(trace > 0, torch.inf, torch.nan)
    shown = sq_norm > 0
    return torch.where(shown, trace / torch.where(shown, sq_norm, 1.0), no_signal)
