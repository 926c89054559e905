"""What a schedule is: a hyperparameter as a function of the number of steps applied.

Step k = 0, 1, ... With Wm warm-up steps and T in all, the first Wm values rise linearly,
init + (max − init) k / Wm, and max is reached at k = Wm. Values are 0-d tensors computed on the
device, so that nothing waits and `torch.compile` does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._made import Made, Remade
from gradfilter._types import State

Curve = Callable[[Tensor], Tensor]


def _nothing(count: Tensor) -> State:
    return {}


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(Remade):
    """A value for every step; recognised by its type, never by being callable.

    Attributes:
        at: ``at(count, state, **extra) -> (value (), state)``, pure.
        init: ``init(count) -> state``; only `plateau` remembers anything.
        max_value: The largest value after the warm-up; `proportional` refers to both.
        min_value: The smallest one.
        made: The call of the factory that made it, by which it is pickled.

    Calling a schedule that remembers nothing gives its value:

    Examples:
        >>> import gradfilter as gf
        >>> round(gf.cosine(0.1, 100)(50).item(), 3)
        0.05
    """

    at: Callable[..., tuple[Tensor, State]]
    max_value: float
    min_value: float
    init: Callable[[Tensor], State] = _nothing
    made: Made | None = None

    @property
    def core(self) -> Any:
        """What gives the values."""
        return self.at, self.init

    def __repr__(self) -> str:
        """The call that made it."""
        if self.made is None:
            return f"Schedule(max_value={self.max_value}, min_value={self.min_value})"
        given = [repr(value) for value in self.made.args]
        given += [f"{name}={value!r}" for name, value in self.made.kwargs.items()]
        return f"{self.made.factory.__name__}({', '.join(given)})"

    def __call__(self, count: int | Tensor) -> Tensor:
        """The value at step ``count``, for schedules without a state."""
        count = torch.as_tensor(count)
        return self.at(count, self.init(count))[0]


def as_schedule(value: float | Tensor | Schedule) -> Schedule:
    """A schedule as it is; a number (or 0-d tensor) as a constant one."""
    if isinstance(value, Schedule):
        return value
    bounds = (0.0, 0.0) if isinstance(value, Tensor) else (value, value)
    return Schedule(lambda count, state, **extra: (_tree.scalar(value, count), state), *bounds)


def after_warmup(
    curve: Curve, max_value: float, min_value: float, warmup_steps: int, init_value: float | None
) -> Schedule:
    """A schedule from what happens after the warm-up; ``curve`` gets k − Wm >= 0."""
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"Expected whole warmup_steps >= 0, found {warmup_steps!r}.")
    if min_value > max_value:
        raise ValueError(
            f"Expected min_value <= max_value, found min_value={min_value}, max_value={max_value}."
        )
    start = min_value if init_value is None else init_value

    def at(count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        k = _tree.scalar(count, count)
        rising = start + (max_value - start) * k / max(warmup_steps, 1)
        return torch.where(k < warmup_steps, rising, curve((k - warmup_steps).clamp(min=0))), state

    return Schedule(at, max_value, min_value)


def progress(total_steps: int, warmup_steps: int) -> Curve:
    """The part done, x = (k − Wm) / (T − Wm), clamped to [0, 1]; 0 for ever where T = Wm."""
    if total_steps < max(warmup_steps, 1):
        raise ValueError(
            f"Expected total_steps >= warmup_steps and >= 1, found total_steps={total_steps}, "
            f"warmup_steps={warmup_steps}."
        )
    span = total_steps - warmup_steps
    return lambda k: (k / span).clamp(max=1) if span else torch.zeros_like(k)
