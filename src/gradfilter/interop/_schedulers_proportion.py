"""The published scheduler of ρ that follows the learning rate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradfilter import _tree
from gradfilter._types import State
from gradfilter.interop._schedulers_count import CountingScheduler
from gradfilter.transforms._following import proportional
from gradfilter.transforms._schedule import Schedule


class ProportionScheduler:
    """ρ in proportion to another scheduler's present lr: `proportional`.

    ρ = min_value + (max_value − min_value) (lr − min_lr) / (max_lr − min_lr), clamped;
    max_value where max_lr = min_lr. It has no count of its own: ``step()`` and ``lr()`` both read
    the lr of the first parameter group as it is now.

    Args:
        pytorch_lr_scheduler: From `torch.optim.lr_scheduler`, or for example a CosineScheduler.
        max_lr: The largest lr after the warm-up.
        min_lr: The smallest.
        max_value: ρ at ``max_lr``.
        min_value: ρ at ``min_lr``, >= 0.

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
        """ρ for the present lr."""
        return self.lr()

    def lr(self) -> float:
        """The same."""
        return self._schedule(0).item()

    def _present_lr(self) -> float:
        scheduler = self.pytorch_lr_scheduler
        if isinstance(scheduler, CountingScheduler):
            return scheduler.lr()
        return float(scheduler.get_last_lr()[0])
