"""Record and restore all that a forward pass depends on in addition to its arguments.

Random numbers, autocast, training modes, attributes of modules, and the versions of tensors that
must not be written between two passes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter.grads._module_attributes import Attributes

# --- Versions of tensors: were they written since a pass read them ---


class Versions:
    """Tensors, and how often each had been written in place at one moment.

    Args:
        tensors: Each with what to call it in an error.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors of inference mode count nothing.
        self._noted = [(n, t, t._version) for n, t in tensors if not t.is_inference()]

    def written(self) -> str | None:
        """What to call a tensor that has been written since, or None."""
        return next((n for n, t, version in self._noted if t._version != version), None)

    def check(self, names: Collection[str] | None = None) -> None:
        """Refuse to compute with tensors that have been written since.

        Args:
            names: Only those called so; None for all.
        """
        for name, tensor, version in self._noted:
            if tensor._version != version and (names is None or name in names):
                raise RuntimeError(
                    f"Expected the tensors of a stack as they were when it was computed, found the "
                    f"{name} written in place since. This question needs another pass over the "
                    "batch: ask it before writing, or compute the stack from clones."
                )


# --- Random generators on the host: Python's, NumPy's, and those in attributes of modules. ---
#
# Wav2Vec2 and Whisper, for example, draw their masks with NumPy. A draw on the host is one value
# for all rows of a pass, and a repeated pass must draw it again.


Generator = tuple[str, Callable[[], Any], Callable[[Any], None]]
"""What to call it in an error; how to read and how to set its state."""


class HostRandom:
    """The states of the generators at one moment.

    Args:
        own: Generators in attributes of modules, by name.
        everywhere: Python's and NumPy's generators, which anybody may draw from, too.
    """

    def __init__(self, own: Iterable[tuple[str, Any]], *, everywhere: bool = True) -> None:
        self._generators = [
            *(_global() if everywhere else ()),
            *(_accessors(name, generator) for name, generator in own),
        ]
        self._states = [get() for _, get, _ in self._generators]

    def present(self) -> HostRandom:
        """The states of the same generators now."""
        found = object.__new__(HostRandom)
        found._generators = self._generators
        found._states = [get() for _, get, _ in self._generators]
        return found

    def restore(self) -> None:
        """Set every generator back to its state at that moment."""
        for (_, _, put), state in zip(self._generators, self._states, strict=True):
            put(state)

    def moved(self) -> str | None:
        """The name of a generator that has drawn since; torch's own are left out.

        Those draw for every row, also in a pass over all rows at once.
        """
        for (name, get, _), state in zip(self._generators, self._states, strict=True):
            if not isinstance(state, torch.Tensor) and not _equal(get(), state):
                return str(name)
        return None


def _global() -> list[Generator]:
    found: list[Generator] = [("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing with it
    if numpy is not None:
        found.append(("numpy.random", numpy.random.get_state, numpy.random.set_state))
    return found


def _accessors(name: str, generator: Any) -> Generator:
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator

        def put(state: Any) -> None:
            bits.state = state

        return name, lambda: bits.state, put
    if hasattr(generator, "getstate"):
        return name, generator.getstate, generator.setstate
    return name, generator.get_state, generator.set_state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, tuple) and any(hasattr(item, "tobytes") for item in a):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


# --- The context of a call ---


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
class CallContext:
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
    ) -> CallContext:
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
    def restored(self) -> Iterator[None]:
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
