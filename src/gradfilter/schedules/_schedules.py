"""Schedules: a hyperparameter as a function of the number of applied steps.

Step k = 0, 1, ... With Wm warm-up steps and T in all, the first Wm values rise linearly,
init + (max − init) k / Wm, and max is reached at k = Wm. Values are 0-d tensors computed on the
device, so that the host does not wait and `torch.compile` does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._factory import FactoryCall, MadeByFactory, factory
from gradfilter._types import State

# --- The type of schedules ---


Curve = Callable[[Tensor], Tensor]


def _no_state(count: Tensor) -> State:
    return {}


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(MadeByFactory):
    """A value for every step. A schedule is recognised by its type, not by being callable.

    Attributes:
        at: ``at(count, state, **extra) -> (value (), state)``, pure.
        init: ``init(count) -> state``; only `plateau` has a state.
        max_value: The largest value after the warm-up; `proportional` refers to both.
        min_value: The smallest value.
        made_by: The call of the factory that made it, used for pickling.

    Calling a schedule without a state gives its value:

    Examples:
        >>> import gradfilter as gf
        >>> round(gf.schedules.cosine(0.1, 100)(50).item(), 3)
        0.05
    """

    at: Callable[..., tuple[Tensor, State]]
    max_value: float
    min_value: float
    init: Callable[[Tensor], State] = _no_state
    made_by: FactoryCall | None = None

    @property
    @override
    def core(self) -> Any:
        """The functions that give the values."""
        return self.at, self.init, self.max_value, self.min_value

    @override
    def __repr__(self) -> str:
        """Return the call that made it, or its range if there is none."""
        if self.call is None:
            return f"Schedule(max_value={self.max_value}, min_value={self.min_value})"
        return str(self.call)

    @property
    def depends_on_count_alone(self) -> bool:
        """Whether the value is known to depend on the step alone, and on no published metric."""
        return isinstance(self.at, (_AfterWarmup, _Constant))

    def __call__(self, count: int | Tensor) -> Tensor:
        """Return the value at step ``count``, for schedules without a state."""
        count = torch.as_tensor(count)
        return self.at(count, self.init(count))[0]


def as_schedule(value: float | Tensor | Schedule) -> Schedule:
    """Return a schedule unchanged; make a constant one from a number or 0-d tensor."""
    if isinstance(value, Schedule):
        return value
    bounds = (0.0, 0.0) if isinstance(value, Tensor) else (value, value)
    return Schedule(_Constant(value), *bounds)


@dataclass(frozen=True, eq=False)
class _Constant:
    """Give a number, or a 0-d tensor, at every step."""

    value: float | Tensor

    def __call__(self, count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        return _tree.scalar(self.value, count), state


def after_warmup(
    curve: Curve, max_value: float, min_value: float, warmup_steps: int, init_value: float | None
) -> Schedule:
    """Return a schedule from its curve after the warm-up; ``curve`` gets k − Wm >= 0."""
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"Expected whole warmup_steps >= 0, found {warmup_steps!r}.")
    if min_value > max_value:
        raise ValueError(
            f"Expected min_value <= max_value, found min_value={min_value}, max_value={max_value}."
        )
    start = min_value if init_value is None else init_value
    return Schedule(_AfterWarmup(curve, start, max_value, warmup_steps), max_value, min_value)


@dataclass(frozen=True, eq=False)
class _AfterWarmup:
    """Rise linearly from ``start`` to the maximum, then follow the curve of k − Wm."""

    curve: Curve
    start: float
    max_value: float
    warmup_steps: int

    def __call__(self, count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        k, start, warmup_steps = _tree.scalar(count, count), self.start, self.warmup_steps
        rising = start + (self.max_value - start) * k / max(warmup_steps, 1)
        falling = self.curve((k - warmup_steps).clamp(min=0))
        return torch.where(k < warmup_steps, rising, falling), state


def progress(total_steps: int, warmup_steps: int) -> Curve:
    """Return the progress x = (k − Wm) / (T − Wm), clamped to [0, 1]; always 0 if T = Wm."""
    if total_steps < max(warmup_steps, 1):
        raise ValueError(
            f"Expected total_steps >= warmup_steps and >= 1, found total_steps={total_steps}, "
            f"warmup_steps={warmup_steps}."
        )
    span = total_steps - warmup_steps
    return lambda k: (k / span).clamp(max=1) if span else torch.zeros_like(k)


# --- Schedules that depend on the step alone: constant, linear, cosine, poly and step ---


@factory
def constant(value: float, *, warmup_steps: int = 0, init_value: float | None = None) -> Schedule:
    """Return a schedule of one value, after an optional warm-up from ``init_value`` (0).

    Args:
        value: The value.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; 0 by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.schedules.constant(1.0, warmup_steps=2)(k).item() for k in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """
    start = 0.0 if init_value is None else init_value
    return after_warmup(lambda k: torch.full_like(k, value), value, value, warmup_steps, start)


@factory
def linear(
    max_value: float,
    total_steps: int,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Fall linearly: max + (min − max) x, with x the progress after the warm-up in [0, 1].

    Args:
        max_value: The value at the end of the warm-up.
        total_steps: The number T of steps, including the warm-up.
        min_value: The value from step T on.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.schedules.linear(1.0, 4)(k).item() for k in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """
    x = progress(total_steps, warmup_steps)
    curve = partial(_linear, progress=x, max_value=max_value, min_value=min_value)
    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


def _linear(k: Tensor, *, progress: Curve, max_value: float, min_value: float) -> Tensor:
    """Return max + (min − max) x, with x the progress."""
    return max_value + (min_value - max_value) * progress(k)


@factory
def cosine(
    max_value: float,
    total_steps: int,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Fall like a cosine: min + (max − min) (1 + cos πx) / 2, with x as in `linear`.

    Args:
        max_value: The value at the end of the warm-up.
        total_steps: The number T of steps, including the warm-up.
        min_value: The value from step T on.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [round(gf.schedules.cosine(1.0, 4)(k).item(), 4) for k in (0, 1, 2, 4)]
        [1.0, 0.8536, 0.5, 0.0]

    References:
        Loshchilov, Hutter, "SGDR", 2017, https://arxiv.org/abs/1608.03983
    """
    x = progress(total_steps, warmup_steps)
    curve = partial(_cosine, progress=x, max_value=max_value, min_value=min_value)
    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


def _cosine(k: Tensor, *, progress: Curve, max_value: float, min_value: float) -> Tensor:
    """Return min + (max − min) (1 + cos πx) / 2, with x the progress."""
    return min_value + (max_value - min_value) * (1 + torch.cos(torch.pi * progress(k))) / 2


@factory
def poly(
    max_value: float,
    power: float,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Fall by a power of the step: min + (max − min) (k − Wm + 1)^power.

    Args:
        max_value: The value at the end of the warm-up.
        power: The exponent, at most 0; −0.5 is the inverse square root.
        min_value: The limit for large k.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.schedules.poly(1.0, -1.0)(k).item() for k in (0, 1, 3)]
        [1.0, 0.5, 0.25]
    """
    if power > 0:
        raise ValueError(f"Expected power <= 0, found power={power}. -0.5 is usual.")
    curve = partial(_poly, power=power, max_value=max_value, min_value=min_value)
    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


def _poly(k: Tensor, *, power: float, max_value: float, min_value: float) -> Tensor:
    """Return min + (max − min) (k + 1)^power, with k the steps after the warm-up."""
    return min_value + (max_value - min_value) * (k + 1) ** power


@factory
def step(
    max_value: float,
    every: int,
    factor: float = 0.1,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Drop by a factor at fixed intervals: max(min, max · factor^⌊(k − Wm) / every⌋).

    Args:
        max_value: The value at the end of the warm-up.
        every: The number of steps between drops, >= 1.
        factor: The factor of each drop, in (0, 1].
        min_value: The smallest value.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.schedules.step(1.0, 2, 0.5)(k).item() for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if every < 1 or not 0 < factor <= 1:
        raise ValueError(
            f"Expected every >= 1 and 0 < factor <= 1, found every={every}, factor={factor}."
        )
    curve = partial(_step, every=every, factor=factor, max_value=max_value, min_value=min_value)
    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


def _step(k: Tensor, *, every: int, factor: float, max_value: float, min_value: float) -> Tensor:
    """Return max(min, max · factor^⌊k / every⌋), with k the steps after the warm-up."""
    return (max_value * factor ** torch.floor(k / every)).clamp(min=min_value)


# --- Schedules that depend on a metric or on the learning rate ---


@factory
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

    The metric is the extra keyword ``value=`` of the update, a 0-d tensor, in the steps that have
    one. The best value and the counter are in the state of the transform. An improvement is
    relative, as in `torch.optim.lr_scheduler.ReduceLROnPlateau`: m < best · (1 − threshold) for
    "min". A report affects the step it comes with. If that step is skipped, the report is
    discarded.

    Args:
        max_value: The value at the end of the warm-up.
        factor: The factor of each drop, in (0, 1).
        patience: The number of reports without improvement that cause no drop.
        threshold: The smallest relative improvement that counts.
        mode: "min" if the metric should fall, "max" if it should rise.
        min_value: The smallest value.
        warmup_steps: The number Wm of warm-up steps.
        init_value: The value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import torch, gradfilter as gf
        >>> lr = gf.schedules.plateau(1.0, factor=0.5, patience=0)
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
    start = min_value if init_value is None else init_value
    rise = constant(1.0, warmup_steps=warmup_steps, init_value=0.0)
    sign = 1.0 if mode == "min" else -1.0
    drops = _Plateau(factor, patience, threshold, sign, max_value, min_value, start, rise)
    return Schedule(drops.at, max_value, min_value, drops.init)


@dataclass(frozen=True, eq=False)
class _Plateau:
    """The two functions of `plateau`, and its arguments.

    Attributes:
        sign: 1 if the metric should fall, −1 if it should rise.
        start: The value at step 0 of the warm-up.
        rise: The part of the way from ``start`` to the value, 1 after the warm-up.
    """

    factor: float
    patience: int
    threshold: float
    sign: float
    max_value: float
    min_value: float
    start: float
    rise: Schedule

    def init(self, count: Tensor) -> State:
        return {
            "best": _tree.scalar(torch.inf, count),
            "bad": _tree.scalar(0.0, count),
            "value": _tree.scalar(self.max_value, count),
        }

    def at(self, count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        if extra.get("value") is not None:
            state = self._reported(self.sign * _tree.scalar(extra["value"], count), state)
        rise = self.rise(count).to(count.device)
        return self.start + (state["value"] - self.start) * rise, state

    def _reported(self, metric: Tensor, state: State) -> State:
        """Return the state after a report of a metric that should fall."""
        # |best| makes the relative margin an improvement also for negative metrics.
        margin = torch.where(state["best"].isinf(), 0.0, self.threshold * state["best"].abs())
        better = metric < state["best"] - margin
        bad = torch.where(better, 0.0, state["bad"] + 1)
        drop = bad > self.patience
        dropped = (state["value"] * self.factor).clamp(min=self.min_value)
        return {
            "best": torch.where(better, metric, state["best"]),
            "bad": torch.where(drop, 0.0, bad),
            "value": torch.where(drop, dropped, state["value"]),
        }


@factory
def proportional(lr: Schedule, rho_min: float, rho_max: float) -> Schedule:
    """Return ρ in proportion to the learning rate of the same step, as in GSAM.

    ρ = ρ_min + (ρ_max − ρ_min) (lr − lr_min) / (lr_max − lr_min), clamped to [ρ_min, ρ_max];
    ρ_max if the lr does not vary.

    Args:
        lr: The schedule of the learning rate.
        rho_min: The smallest radius.
        rho_max: The largest radius.

    Examples:
        >>> import gradfilter as gf
        >>> rho = gf.schedules.proportional(gf.schedules.linear(0.1, 10), 0.02, 0.04)
        >>> [round(rho(k).item(), 3) for k in (0, 5, 10)]
        [0.04, 0.03, 0.02]
    """
    if not isinstance(lr, Schedule):
        raise TypeError(f"Expected a Schedule of the lr, found {type(lr).__name__}.")
    if not 0 <= rho_min <= rho_max:
        raise ValueError(f"Expected 0 <= rho_min <= rho_max, found {rho_min}, {rho_max}.")
    return Schedule(_Proportional(lr, rho_min, rho_max), rho_max, rho_min, lr.init)


@dataclass(frozen=True, eq=False)
class _Proportional:
    """ρ in proportion to the lr, which also has the state."""

    lr: Schedule
    rho_min: float
    rho_max: float

    def __call__(self, count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        lr, span = self.lr, self.lr.max_value - self.lr.min_value
        value, state = lr.at(count, state, **extra)
        part = ((value - lr.min_value) / span).clamp(0, 1) if span else torch.ones_like(value)
        return self.rho_min + (self.rho_max - self.rho_min) * part, state
