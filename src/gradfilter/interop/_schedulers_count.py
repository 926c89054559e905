"""What the published schedulers share: a counter in front of a pure schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.optim import Optimizer

from gradfilter.transforms._schedule import Schedule


class CountingScheduler(ABC):
    """A schedule and the count k of its next value.

    The value of step k is that of `Schedule.at` at k, after ``warmup_steps`` from ``init_value``.
    With an optimizer, whose lr it then sets, the value of step 0 is set at once, as by
    `torch.optim.lr_scheduler`, and every ``step()`` after a training step sets the next; without
    one, the first ``step()`` returns the value of step 0. So GSAM, which asks for its first ρ when
    it is made, has ρ and lr of the same k in every training step.

    Args:
        T_max: Steps in all, warm-up included.
        max_value: Value at the end of the warm-up.
        min_value: Value at the end.
        init_value: Value at step 0 of the warm-up.
        warmup_steps: Length of the warm-up; ``warmup_step`` is another spelling.
        optimizer: Whose groups' lr to set; None for only returning values.
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
        self.schedule = self._schedule(max_value, T_max, min_value, warmup_steps, init_value)
        self.optimizer, self.t = optimizer, 0
        if optimizer is not None:
            self.step()

    @abstractmethod
    def _schedule(
        self, top: float, total: int, low: float, warmup_steps: int, init_value: float
    ) -> Schedule:
        """The schedule from ``max_value``, ``T_max``, ``min_value`` and the warm-up."""

    def step(self) -> float:
        """Return the next value, and set it as the lr of every group of the optimizer."""
        self.t += 1
        self._set()
        return self.lr()

    def lr(self) -> float:
        """The value that the last ``step()`` returned; that of step 0 before the first."""
        return self.schedule(max(self.t - 1, 0)).item()

    def state_dict(self) -> dict[str, int]:
        """The count."""
        return {"t": self.t}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a count."""
        self.t = state_dict["t"]
        self._set()

    def _set(self) -> None:
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr())  # captured and compiled steps hold on to the tensor
            else:
                group["lr"] = self.lr()
