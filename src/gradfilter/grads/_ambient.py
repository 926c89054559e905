"""What a forward pass depends on in addition to its arguments.

Random numbers, autocast, training modes, attributes of modules, and tensors that nobody may write
between two passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter.grads._attributes import Attributes
from gradfilter.grads._host_random import HostRandom
from gradfilter.grads._versions import Versions


class Rewinds:
    """Random numbers of one device for steps that are captured in a CUDA graph.

    Inside a capture a generator's state can be neither read nor set, but the generator can be
    pointed at another state. So every return to the start of the step takes a clone of its own,
    made by the runs before the capture: ``main`` is drawn from first, then one spare per return.

    Args:
        generator: The one that the computation draws from; left as it was found.
        start: Its state at the start of the step.
    """

    def __init__(self, generator: torch.Generator, start: Tensor) -> None:
        self.generator = generator
        self.states = [generator.clone_state()]
        self._taken = 0
        self._moments = 0
        self.align(start)

    def align(self, start: Tensor) -> None:
        """Let the next step, run or replayed, draw from ``start`` on."""
        self._start = start
        for state in self.states:
            state.set_state(start)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """One step drawing from these states."""
        before = self.generator.graphsafe_get_state()
        token = _REWINDS.set(self)
        self._taken = self._moments = 0
        self.generator.graphsafe_set_state(self.states[0])
        try:
            yield
        finally:
            _REWINDS.reset(token)
            self.generator.graphsafe_set_state(before)

    def to_start(self) -> None:
        """Draw the numbers of this step again."""
        self._taken += 1
        if self._taken == len(self.states):
            spare = self.states[0].clone_state()
            spare.set_state(self._start)
            self.states.append(spare)
        self.generator.graphsafe_set_state(self.states[self._taken])

    def moment(self) -> None:
        """Refuse a moment that may not be the start of the step: nothing leads back to it."""
        self._moments += 1
        if self._moments > 1:
            raise RuntimeError(
                "Expected one gradient function in a captured step, found a second one called by "
                "the loss or a link. Call step(state, batch) instead of capturing it."
            )


_REWINDS: ContextVar[Rewinds | None] = ContextVar("rewinds", default=None)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators a computation on ``device`` draws from."""
    rewinds = _REWINDS.get()
    if rewinds is not None:
        return {"cuda": rewinds.generator.graphsafe_get_state()}
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators into a state that `random_state` returned.

    In a captured step the only such state is the one at its start.
    """
    rewinds = _REWINDS.get()
    if rewinds is not None:
        rewinds.to_start()
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were on entry."""
    rewinds = _REWINDS.get()
    before = random_state(device)
    try:
        yield
    finally:
        if rewinds is None:
            set_random_state(before, device)
        else:
            rewinds.generator.graphsafe_set_state(before["cuda"])


@dataclass(frozen=True)
class Ambient:
    """All that a moment's forward pass depends on in addition to its arguments.

    Attributes:
        device: Where the computation runs.
        random: The state of torch's generators.
        host: The state of Python's, NumPy's and the modules' own generators.
        autocast: Device type, dtype, and whether it is on.
        training: Every module, and whether it is in training mode.
        attributes: The attributes of the modules.
        versions: Tensors that a pass reads, and how often each had been written.
    """

    device: torch.device
    random: dict[str, Any]
    host: HostRandom
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    training: tuple[tuple[nn.Module, bool], ...]
    attributes: Attributes
    versions: Versions

    @classmethod
    def now(
        cls,
        device: torch.device,
        modules: dict[str, nn.Module],
        tensors: Iterable[tuple[str, Tensor]] = (),
        attributes: Attributes | None = None,
        *,
        everywhere: bool = True,
    ) -> Ambient:
        """Note the present state.

        Args:
            device: Where the computation runs.
            modules: What it calls, by name.
            tensors: What else it reads, each with what to call it in an error.
            attributes: Those of the modules, where they are known already.
            everywhere: Python's and NumPy's generators may be drawn from.
        """
        kinds = sorted({"cpu", device.type})
        rewinds = _REWINDS.get()
        if rewinds is not None:
            rewinds.moment()
        attributes = attributes or Attributes(modules)
        return cls(
            device,
            random_state(device),
            HostRandom(attributes.generators, everywhere=everywhere),
            tuple(
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in kinds
                if torch.amp.is_autocast_available(kind)
            ),
            tuple((m, m.training) for m in modules.values()),
            attributes,
            Versions([*tensors, *((f"attribute {n}", t) for n, t in attributes.tensors)]),
        )

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Give every module the mode it was in."""
        present = [(module, module.training) for module, _ in self.training]
        try:
            for module, training in self.training:
                module.training = training
            yield
        finally:
            for module, training in present:  # a forward pass may have set other ones
                module.training = training

    def rewind(self) -> None:
        """Set random numbers and attributes back to that moment, for another attempt at a pass."""
        set_random_state(self.random, self.device)
        self.host.restore()
        self.attributes.restore()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Compute as if it were that moment; nothing outside notices.

        Raises:
            RuntimeError: A tensor that the pass reads has been written since.
        """
        self.versions.check()
        with ExitStack() as stack:
            stack.enter_context(random_state_restored(self.device))
            stack.callback(self.host.present().restore)
            stack.callback(self.attributes.present().restore)
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            stack.enter_context(self.modes())
            self.rewind()
            yield
