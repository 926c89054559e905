"""Schedules that follow something else: a metric that stops improving, or the learning rate."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import State
from gradfilter.transforms._schedule import Schedule
from gradfilter.transforms._schedules import constant


@remembered
def plateau(
    max_value: float,
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    mode: Literal["min", "max"] = "min",
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Drop by a factor when a metric has not improved for more than ``patience`` reports.

    The metric arrives as the extra keyword ``value=`` of the update, as a 0-d tensor, in the steps
    that have one; best value and counter live in the state of the link. An improvement is relative,
    as in `torch.optim.lr_scheduler.ReduceLROnPlateau`: m < best · (1 − threshold) for "min". A
    report acts on the step it comes with, and is forgotten with it if the step is skipped.

    Args:
        max_value: Value at the end of the warm-up.
        factor: In (0, 1).
        patience: Reports without improvement that are forgiven.
        threshold: Relative improvement that counts.
        mode: Whether the metric should fall or rise.
        min_value: Never below this.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import torch, gradfilter as gf
        >>> lr = gf.plateau(1.0, factor=0.5, patience=0)
        >>> k = torch.tensor(0)
        >>> value, state = lr.at(k, lr.init(k), value=torch.tensor(3.0))
        >>> lr.at(k, state, value=torch.tensor(3.0))[0].item()
        0.5
    """
    if not 0 < factor < 1 or patience < 0 or mode not in ("min", "max"):
        raise ValueError(
            'Expected 0 < factor < 1, patience >= 0 and mode "min" or "max", found '
            f"factor={factor}, patience={patience}, mode={mode!r}."
        )
    if min_value > max_value:
        raise ValueError(
            f"Expected min_value <= max_value, found min_value={min_value}, max_value={max_value}."
        )
    warm = constant(1.0, warmup_steps=warmup_steps, init_value=0.0)
    start = min_value if init_value is None else init_value
    sign = 1.0 if mode == "min" else -1.0

    def init(count: Tensor) -> State:
        return {
            "best": _tree.scalar(torch.inf, count),
            "bad": _tree.scalar(0.0, count),
            "value": _tree.scalar(max_value, count),
        }

    def at(count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        if extra.get("value") is not None:
            metric = sign * _tree.scalar(extra["value"], count)
            # |best| makes the relative margin one of improvement for negative metrics, too.
            margin = torch.where(state["best"].isinf(), 0.0, threshold * state["best"].abs())
            better = metric < state["best"] - margin
            bad = torch.where(better, 0.0, state["bad"] + 1)
            drop = bad > patience
            dropped = (state["value"] * factor).clamp(min=min_value)
            state = {
                "best": torch.where(better, metric, state["best"]),
                "bad": torch.where(drop, 0.0, bad),
                "value": torch.where(drop, dropped, state["value"]),
            }
        rise = warm(count).to(count.device)
        return start + (state["value"] - start) * rise, state

    return Schedule(at, max_value, min_value, init)


@remembered
def proportional(lr: Schedule, rho_min: float, rho_max: float) -> Schedule:
    """ρ in proportion to the learning rate of the same step, as GSAM has it.

    ρ = ρ_min + (ρ_max − ρ_min) (lr − lr_min) / (lr_max − lr_min), clamped to [ρ_min, ρ_max];
    ρ_max where the lr does not vary.

    Args:
        lr: The schedule of the learning rate.
        rho_min: Smallest radius.
        rho_max: Largest radius.

    Examples:
        >>> import gradfilter as gf
        >>> rho = gf.proportional(gf.linear(0.1, 10), 0.02, 0.04)
        >>> [round(rho(k).item(), 3) for k in (0, 5, 10)]
        [0.04, 0.03, 0.02]
    """
    if not isinstance(lr, Schedule):
        raise TypeError(f"Expected a Schedule of the lr, found {type(lr).__name__}.")
    if not 0 <= rho_min <= rho_max:
        raise ValueError(f"Expected 0 <= rho_min <= rho_max, found {rho_min}, {rho_max}.")
    span = lr.max_value - lr.min_value

    def at(count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        value, state = lr.at(count, state, **extra)
        part = ((value - lr.min_value) / span).clamp(0, 1) if span else torch.ones_like(value)
        return rho_min + (rho_max - rho_min) * part, state

    return Schedule(at, rho_max, rho_min, lr.init)
