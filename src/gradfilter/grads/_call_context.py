"""Record and restore everything that a forward pass depends on in addition to its arguments.

These are random numbers, autocast, training modes, attributes of modules, and the versions of
tensors that must not be written between two passes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradfilter.grads._module_attributes import Attributes

# --- Versions of tensors: detect writes after a pass has read them ---


class Versions:
    """Tensors, and the number of in-place writes to each at one moment.

    Args:
        tensors: Pairs of a name and a tensor.
        label: The words for such a tensor in errors, with ``{}`` in place of its name.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], label: str = "{}") -> None:
        self._label = label
        # Tensors of inference mode have no version counter.
        self._noted = [(n, t, t._version) for n, t in tensors if not t.is_inference()]

    def written(self) -> str | None:
        """Return the words for a tensor that has been written since, or None."""
        for name, tensor, version in self._noted:
            if tensor._version != version:
                return self._label.format(name)
        return None

    def check(self, names: Collection[str] | None = None) -> None:
        """Refuse to compute with tensors that have been written since.

        Args:
            names: The names to check; None for all.
        """
        for name, tensor, version in self._noted:
            if tensor._version != version and (names is None or name in names):
                raise RuntimeError(
                    "Expected the tensors of a stack as they were when it was computed, found the "
                    f"{self._label.format(name)} written in place since. This question needs "
                    "another pass over the batch: ask it before writing, or compute the stack from "
                    "clones."
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
            if isinstance(state, torch.Tensor):
                continue
            if _comparable(get()) != _comparable(state):
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


def _comparable(state: Any) -> Any:
    """Return a state with bytes in place of NumPy's arrays, which ``==`` compares item by item."""
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return [item.tobytes() if hasattr(item, "tobytes") else item for item in state]
    return state.tobytes() if hasattr(state, "tobytes") else state


# --- The context of a call ---


class StepRandom(Protocol):
    """The random numbers of a step that is recorded as a graph, in place of torch's generators."""

    def state(self) -> dict[str, Any]:
        """Return the present state."""
        ...

    def set(self, state: dict[str, Any]) -> None:
        """Set a state from which a pass draws its numbers again."""

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the state before a repeated pass."""

    def moment(self) -> None:
        """Note that a pass begins here, which may be repeated."""

    def forget(self, state: dict[str, Any]) -> None:
        """Forget the numbers drawn since a state, by a pass that was given up."""


_RECORDING: ContextVar[StepRandom | None] = ContextVar("recording", default=None)


def recorded() -> StepRandom | None:
    """Return the random numbers of the step that is recorded as a graph; None outside of one."""
    return _RECORDING.get()


def is_recorded() -> bool:
    """Return whether a step is recorded as a graph, so that generators do not move."""
    return recorded() is not None


Surrounding = Callable[[], AbstractContextManager[None]]
"""Returns the context for one run of a graph."""

_SURROUNDINGS: ContextVar[list[Surrounding] | None] = ContextVar("surroundings", default=None)


def surroundings() -> list[Surrounding] | None:
    """Return the contexts in which the graph that is being traced will run, to be added to.

    They do what a graph cannot: a rank compares its rows with those of the others before every run.
    None if nothing is traced, also while a CUDA graph is captured.
    """
    return _SURROUNDINGS.get()


@contextmanager
def recording(numbers: StepRandom, around: list[Surrounding] | None = None) -> Iterator[None]:
    """Let a step draw from ``numbers`` while it is recorded.

    Args:
        numbers: The random numbers of the step.
        around: Gets the contexts in which the graph will run; None for a capture.
    """
    tokens = _RECORDING.set(numbers), _SURROUNDINGS.set(around)
    try:
        yield
    finally:
        _RECORDING.reset(tokens[0])
        _SURROUNDINGS.reset(tokens[1])


class Rewinds(StepRandom):
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
        self._taken = self._moments = 0
        self.generator.graphsafe_set_state(self.states[0])
        try:
            with recording(self):
                yield
        finally:
            self.generator.graphsafe_set_state(before)

    @override
    def state(self) -> dict[str, Any]:
        return {"cuda": self.generator.graphsafe_get_state()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.generator.graphsafe_set_state(state["cuda"])

    @override
    def forget(self, state: dict[str, Any]) -> None:
        pass  # numbers drawn in a capture cannot be taken back; they are only not used

    @override
    def set(self, state: dict[str, Any]) -> None:
        self.to_start()  # the only state that can be set

    def to_start(self) -> None:
        """Draw the numbers of this step again."""
        self._taken += 1
        if self._taken == len(self.states):
            spare = self.states[0].clone_state()
            spare.set_state(self._start)
            self.states.append(spare)
        self.generator.graphsafe_set_state(self.states[self._taken])

    @override
    def moment(self) -> None:
        """Refuse to record a moment after the start of the step: it cannot be restored."""
        self._moments += 1
        if self._moments > 1:
            raise RuntimeError(
                "Expected one gradient function in a captured step, found a second one called by "
                "the loss or a transform. Call step(state, batch) instead of capturing it."
            )


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators that a computation on ``device`` draws from."""
    numbers = _RECORDING.get()
    if numbers is not None:
        return numbers.state()
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state that `random_state` returned.

    In a captured step this must be the state at the step's start.
    """
    numbers = _RECORDING.get()
    if numbers is not None:
        numbers.set(state)
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def undo_draws(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state, as if no numbers had been drawn since."""
    _forget_draws(state)
    set_random_state(state, device)


def _forget_draws(state: dict[str, Any]) -> None:
    numbers = _RECORDING.get()
    if numbers is not None:
        numbers.forget(state)


def same_random_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether no random number was drawn between two states."""
    return all(
        torch.equal(a[kind], state) if isinstance(state, Tensor) else a[kind] == state
        for kind, state in b.items()
    )


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Restore the state of the generators on exit."""
    before, numbers = random_state(device), _RECORDING.get()
    try:
        yield
    finally:
        if numbers is None:
            set_random_state(before, device)
        else:
            numbers.restore(before)


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
        numbers = _RECORDING.get()
        if numbers is not None:
            numbers.moment()
        attributes = attributes or Attributes(modules)
        return cls(
            device,
            random_state(device),
            HostRandom(attributes.generators, everywhere=everywhere),
            tuple(
                [
                    (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                    for kind in kinds
                    if torch.amp.is_autocast_available(kind)
                ]
            ),
            tuple([(m, m.training) for m in modules.values()]),
            attributes,
            Versions([*tensors, *[(f"attribute {n}", t) for n, t in attributes.tensors]]),
        )

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Set every module to the recorded mode, and restore its present mode on exit."""
        present = [(module, module.training) for module, _ in self.training]
        try:
            set_modes(self.training)
            yield
        finally:
            set_modes(present)  # a forward pass may have changed modes

    def rewind(self) -> None:
        """Reset random numbers, modes and attributes to that moment."""
        set_random_state(self.random, self.device)
        self.host.restore()
        self.attributes.restore()
        set_modes(self.training)

    def switched(self) -> nn.Module | None:
        """Return a module that is in another mode than at that moment, or None."""
        return next((m for m, training in self.training if m.training != training), None)

    def undo(self) -> None:
        """Reset to that moment, as if the passes since then had not been made."""
        _forget_draws(self.random)
        self.rewind()

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


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the modules to training or evaluation mode, each by itself."""
    for module, training in modes:
        if module.training is not training:  # nn.Module assigns slowly
            module.training = training
