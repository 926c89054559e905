"""Record and restore everything that a forward pass depends on in addition to its arguments.

These are random numbers, autocast, training modes, attributes of modules, and the versions of
tensors that must not be written between two passes.
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

# --- Versions of tensors: detect writes after a pass has read them ---


class Versions:
    """Tensors, and the number of in-place writes to each at one moment.

    Args:
        tensors: Pairs of a name for errors and a tensor.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors of inference mode have no version counter.
        self._noted = [(n, t, t._version) for n, t in tensors if not t.is_inference()]

    def written(self) -> str | None:
        """Return the name of a tensor that has been written since, or None."""
        return next((n for n, t, version in self._noted if t._version != version), None)

    def check(self, names: Collection[str] | None = None) -> None:
        """Refuse to compute with tensors that have been written since.

        Args:
            names: The names to check; None for all.
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
"""The name in errors, and the functions that read and set the state."""


class HostRandom:
    """The states of the generators at one moment.

    Args:
        own: The generators in attributes of modules, by name.
        everywhere: True to include Python's and NumPy's global generators.
    """

    def __init__(self, own: Iterable[tuple[str, Any]], *, everywhere: bool = True) -> None:
        self._generators = [
            *(_global() if everywhere else ()),
            *(_accessors(name, generator) for name, generator in own),
        ]
        self._states = [get() for _, get, _ in self._generators]

    def present(self) -> HostRandom:
        """Return the states of the same generators now."""
        found = object.__new__(HostRandom)
        found._generators = self._generators
        found._states = [get() for _, get, _ in self._generators]
        return found

    def restore(self) -> None:
        """Set every generator back to its state at that moment."""
        for (_, _, put), state in zip(self._generators, self._states, strict=True):
            put(state)

    def moved(self) -> str | None:
        """Return the name of a generator that has drawn since; torch's own are omitted.

        torch's generators draw for every row, also in a pass over all rows at once.
        """
        for (name, get, _), state in zip(self._generators, self._states, strict=True):
            if not isinstance(state, torch.Tensor) and not _equal(get(), state):
                return str(name)
        return None


def _global() -> list[Generator]:
    found: list[Generator] = [("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")  # a program that has not imported NumPy does not draw from it
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
    """The random numbers of one device for steps that are captured in a CUDA graph.

    Inside a capture a generator's state can be neither read nor set, but the generator can be
    pointed at another state. So every return to the start of the step uses its own clone, made by
    the runs before the capture: first ``main``, then one spare per return.

    Args:
        generator: The generator of the computation; its state is the same afterwards.
        start: The generator's state at the start of the step.
    """

    def __init__(self, generator: torch.Generator, start: Tensor) -> None:
        self.generator = generator
        self.states: list[torch.Generator] = [generator.clone_state()]
        self._taken = 0
        self._moments = 0
        self.align(start)

    def align(self, start: Tensor) -> None:
        """Let the next step, run or replayed, draw from the state ``start``."""
        self._start = start
        for state in self.states:
            state.set_state(start)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Run one step that draws from these states."""
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
        """Refuse to record a moment after the start of the step: it cannot be restored."""
        self._moments += 1
        if self._moments > 1:
            raise RuntimeError(
                "Expected one gradient function in a captured step, found a second one called by "
                "the loss or a transform. Call step(state, batch) instead of capturing it."
            )


_REWINDS: ContextVar[Rewinds | None] = ContextVar("rewinds", default=None)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators that a computation on ``device`` draws from."""
    rewinds = _REWINDS.get()
    if rewinds is not None:
        return {"cuda": rewinds.generator.graphsafe_get_state()}
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state that `random_state` returned.

    In a captured step this must be the state at the step's start.
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
    """Restore the state of the generators on exit."""
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
    """Everything that a forward pass depends on in addition to its arguments, at one moment.

    Attributes:
        device: The device of the computation.
        random: The state of torch's generators.
        host: The state of Python's, NumPy's and the modules' own generators.
        autocast: The device type, the dtype, and whether autocast is enabled.
        training: Every module with its training mode.
        attributes: The attributes of the modules.
        versions: The tensors that a pass reads, with their versions.
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
        """Record the present state.

        Args:
            device: The device of the computation.
            modules: The modules that it calls, by name.
            tensors: Other tensors that it reads, each with a name for errors.
            attributes: The attributes of the modules, if they are known already.
            everywhere: True if Python's and NumPy's generators may be used.
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
        """Set every module to the recorded mode, and restore its present mode on exit."""
        present = [(module, module.training) for module, _ in self.training]
        try:
            for module, training in self.training:
                module.training = training
            yield
        finally:
            for module, training in present:  # a forward pass may have changed modes
                module.training = training

    def rewind(self) -> None:
        """Reset random numbers, modes and attributes to that moment, for another attempt."""
        set_random_state(self.random, self.device)
        self.host.restore()
        self.attributes.restore()
        for module, training in self.training:
            module.training = training

    def switched(self) -> nn.Module | None:
        """Return a module that is in another mode than at that moment, or None."""
        return next((m for m, training in self.training if m.training != training), None)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Compute in the recorded state, and restore the present state on exit.

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
