"""The published schedulers of lr and ρ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import State
from gradfilter.schedules._schedules import Schedule, cosine, linear, poly, proportional, step

# --- A counter in front of a pure schedule ---


class CountingScheduler(ABC):
    """A schedule with a counter k of its next value.

    The value of step k is that of `Schedule.at` at k, after ``warmup_steps`` from ``init_value``.
    With an optimizer, whose lr it then sets, the value of step 0 is set at once, as by
    `torch.optim.lr_scheduler`, and every ``step()`` after a training step sets the next; without
    one, the first ``step()`` returns the value of step 0. So GSAM, which reads its first ρ when
    it is made, has ρ and lr of the same k in every training step.

    Args:
        T_max: The number of steps, including the warm-up.
        max_value: The value at the end of the warm-up.
        min_value: The value at the end.
        init_value: The value at step 0 of the warm-up.
        warmup_steps: The number of warm-up steps; ``warmup_step`` is another spelling.
        optimizer: The optimizer whose lr is set; None to only return values.
    """

    def __init__(
        self,
        T_max: int,
        max_value: float,
        min_value: float = 0.0,
        init_value: float = 0.0,
        warmup_steps: int = 0,
        optimizer: Optimizer | None = None,
        *,
        warmup_step: int | None = None,
    ) -> None:
        if warmup_step is not None and warmup_steps:
            raise TypeError("Expected warmup_steps or warmup_step, found both. Give one of them.")
        warmup_steps = warmup_steps if warmup_step is None else warmup_step
        self.schedule: Schedule = self._schedule(
            max_value, T_max, min_value, warmup_steps, init_value
        )
        self.optimizer: Optimizer | None = optimizer
        self.t: int = 0
        if optimizer is not None:
            self.step()

    @abstractmethod
    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        """Return the schedule from ``max_value``, ``T_max``, ``min_value`` and the warm-up."""

    def step(self) -> float:
        """Return the next value, and set it as the lr of every group of the optimizer."""
        self.t += 1
        self._set()
        return self.lr()

    def lr(self) -> float:
        """Return the value that the last ``step()`` returned; that of step 0 before the first."""
        return self.schedule(max(self.t - 1, 0)).item()

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"t": self.t}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a count."""
        self.t = state_dict["t"]
        self._set()

    def _set(self) -> None:
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr())  # captured and compiled steps hold the tensor
            else:
                group["lr"] = self.lr()


# --- The scheduler of ρ that is proportional to the learning rate ---


class ProportionScheduler:
    """ρ in proportion to another scheduler's present lr: `proportional`.

    ρ = min_value + (max_value − min_value) (lr − min_lr) / (max_lr − min_lr), clamped;
    max_value where max_lr = min_lr. It has no count: ``step()`` and ``lr()`` both read
    the present lr of the first parameter group.

    Args:
        pytorch_lr_scheduler: A scheduler of `torch.optim.lr_scheduler`, or a CosineScheduler.
        max_lr: The largest lr after the warm-up.
        min_lr: The smallest lr.
        max_value: The value of ρ at ``max_lr``.
        min_value: The value of ρ at ``min_lr``, >= 0.

    Raises:
        ValueError: max_lr < min_lr, or not 0 <= min_value <= max_value.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import ProportionScheduler
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> lr = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        >>> rho = ProportionScheduler(lr, max_lr=1.0, min_lr=0.0, max_value=0.4, min_value=0.2)
        >>> optimizer.step(), lr.step()
        (None, None)
        >>> round(rho.step(), 4)
        0.3
    """

    def __init__(
        self,
        pytorch_lr_scheduler: Any,
        max_lr: float,
        min_lr: float,
        max_value: float,
        min_value: float,
    ) -> None:
        if max_lr < min_lr:
            raise ValueError(
                f"Expected min_lr <= max_lr, found min_lr={min_lr}, max_lr={max_lr}. Swap them."
            )
        self.pytorch_lr_scheduler = pytorch_lr_scheduler

        def present(count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
            return _tree.scalar(self._present_lr(), count), state

        self._schedule = proportional(Schedule(present, max_lr, min_lr), min_value, max_value)

    def step(self) -> float:
        """Return ρ for the present lr."""
        return self.lr()

    def lr(self) -> float:
        """Return ρ for the present lr."""
        return self._schedule(0).item()

    def _present_lr(self) -> float:
        scheduler = self.pytorch_lr_scheduler
        if isinstance(scheduler, CountingScheduler):
            return scheduler.lr()
        return float(scheduler.get_last_lr()[0])


# --- The schedulers of lr and ρ that depend on the step alone ---


class LinearScheduler(CountingScheduler):
    """Max + (min − max) x, x = (k − Wm) / (T − Wm): `linear`, with the arguments of GSAM's.

    It serves for GSAM's ρ and, with ``optimizer=``, for the lr. The same class with the same T and
    Wm for both makes ρ proportional to the lr.

    Args:
        T_max: The number of steps, T.
        max_value: The value at the end of the warm-up.
        min_value: The value at the end.
        init_value: The value at the start of the warm-up.
        warmup_steps: The number Wm of warm-up steps.
        optimizer: The optimizer whose lr is set.

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

    @override
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

    @override
    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        return cosine(top, total, min_value=low, warmup_steps=warmup_steps, init_value=init_value)


class PolyScheduler(CountingScheduler):
    """Min + (max − min) (k − Wm + 1)^poly_order: `poly`.

    Args:
        poly_order: The exponent, at most 0; the first argument, as published.
        *args: The arguments of `LinearScheduler`; T_max has no effect.
        **kwargs: The keywords of `LinearScheduler`.

    Examples:
        >>> from gradfilter.interop import PolyScheduler
        >>> lr = PolyScheduler(T_max=4, max_value=1.0)
        >>> [round(lr.step(), 4) for k in range(4)]
        [1.0, 0.7071, 0.5774, 0.5]
    """

    def __init__(self, poly_order: float = -0.5, *args: Any, **kwargs: Any) -> None:
        self.poly_order = poly_order
        super().__init__(*args, **kwargs)

    @override
    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        return poly(
            top, self.poly_order, min_value=low, warmup_steps=warmup_steps, init_value=init_value
        )


class StepScheduler(CountingScheduler):
    """max(min, max · factor^⌊(k − Wm) / every⌋): `step`, arguments as for `LinearScheduler`.

    Args:
        *args: The arguments of `LinearScheduler`.
        every: The number of steps between drops; by default 3/10 of T − Wm, for three drops.
        factor: The factor of each drop, in (0, 1]; 0.2 in the published CIFAR-10 example.
        **kwargs: The keywords of `LinearScheduler`.

    Examples:
        >>> from gradfilter.interop import StepScheduler
        >>> lr = StepScheduler(T_max=5, max_value=1.0, factor=0.5)
        >>> [lr.step() for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    every: int | None
    factor: float

    def __init__(
        self, *args: Any, every: int | None = None, factor: float = 0.2, **kwargs: Any
    ) -> None:
        self.every, self.factor = every, factor
        super().__init__(*args, **kwargs)

    @override
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
