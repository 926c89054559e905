"""The published schedulers of lr and ρ that depend on the step alone."""

from __future__ import annotations

from math import ceil
from typing import Any

from gradfilter.interop._schedulers_count import CountingScheduler
from gradfilter.transforms._schedule import Schedule
from gradfilter.transforms._schedules import cosine, linear, poly, step


class LinearScheduler(CountingScheduler):
    """Max + (min − max) x, x = (k − Wm) / (T − Wm): `linear`, with the arguments of GSAM's.

    For GSAM's ρ and, with ``optimizer=``, for the lr; the same class with the same T and Wm for
    both makes ρ proportional to the lr.

    Args:
        T_max: The number of steps, T.
        max_value: The value at the end of the warm-up.
        min_value: The value at the end.
        init_value: The value at the start of the warm-up.
        warmup_steps: Wm.
        optimizer: Whose lr to set.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import LinearScheduler
        >>> rho = LinearScheduler(T_max=4, max_value=1.0, warmup_steps=2)
        >>> [rho.step() for k in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=123.0)
        >>> lr = LinearScheduler(T_max=4, max_value=1.0, optimizer=optimizer)
        >>> optimizer.param_groups[0]["lr"], lr.step(), optimizer.param_groups[0]["lr"]
        (1.0, 0.75, 0.75)
    """

    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        return linear(top, total, min_value=low, warmup_steps=warmup_steps, init_value=init_value)


class CosineScheduler(CountingScheduler):
    """Min + (max − min) (1 + cos πx) / 2: `cosine`, with the arguments of `LinearScheduler`.

    Examples:
        >>> from gradfilter.interop import CosineScheduler
        >>> lr = CosineScheduler(T_max=4, max_value=1.0)
        >>> [round(lr.step(), 4) for k in range(5)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """

    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        return cosine(top, total, min_value=low, warmup_steps=warmup_steps, init_value=init_value)


class PolyScheduler(CountingScheduler):
    """Min + (max − min) (k − Wm + 1)^poly_order: `poly`.

    Args:
        poly_order: At most 0, and the first argument, as published.
        *args: Those of `LinearScheduler`; T_max has no effect.
        **kwargs: Likewise.

    Examples:
        >>> from gradfilter.interop import PolyScheduler
        >>> lr = PolyScheduler(T_max=4, max_value=1.0)
        >>> [round(lr.step(), 4) for k in range(4)]
        [1.0, 0.7071, 0.5774, 0.5]
    """

    def __init__(self, poly_order: float = -0.5, *args: Any, **kwargs: Any) -> None:
        self.poly_order = poly_order
        super().__init__(*args, **kwargs)

    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        return poly(
            top, self.poly_order, min_value=low, warmup_steps=warmup_steps, init_value=init_value
        )


class StepScheduler(CountingScheduler):
    """max(min, max · factor^⌊(k − Wm) / every⌋): `step`, arguments as for `LinearScheduler`.

    Args:
        *args: Those of `LinearScheduler`.
        every: Steps between drops; 3/10 of T − Wm by default, three drops in all.
        factor: In (0, 1]; 0.2 is that of the published CIFAR-10 example.
        **kwargs: Those of `LinearScheduler`.

    Examples:
        >>> from gradfilter.interop import StepScheduler
        >>> lr = StepScheduler(T_max=5, max_value=1.0, factor=0.5)
        >>> [lr.step() for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(
        self, *args: Any, every: int | None = None, factor: float = 0.2, **kwargs: Any
    ) -> None:
        self.every, self.factor = every, factor
        super().__init__(*args, **kwargs)

    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        every = max(1, ceil(3 * (total - warmup_steps) / 10)) if self.every is None else self.every
        return step(
            top,
            every,
            self.factor,
            min_value=low,
            warmup_steps=warmup_steps,
            init_value=init_value,
        )
