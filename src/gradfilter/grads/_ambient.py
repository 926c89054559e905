"""What a forward pass depends on beside its arguments: random numbers, autocast, training modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators a computation on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators into a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were on entry."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


@dataclass(frozen=True)
class Ambient:
    """A moment's random state, autocast settings and training modes, to be gone back to."""

    device: torch.device
    random: dict[str, Tensor]
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    training: tuple[tuple[nn.Module, bool], ...]

    @classmethod
    def now(cls, device: torch.device, model: nn.Module | None) -> Ambient:
        """Take the present settings down."""
        kinds = sorted({"cpu", device.type})
        return cls(
            device,
            random_state(device),
            tuple(
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in kinds
                if torch.amp.is_autocast_available(kind)
            ),
            () if model is None else tuple((m, m.training) for m in model.modules()),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Compute as if it were that moment; nothing outside notices."""
        with ExitStack() as stack:
            stack.enter_context(random_state_restored(self.device))
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            for module, training in self.training:
                stack.callback(setattr, module, "training", module.training)
                module.training = training
            set_random_state(self.random, self.device)
            yield
