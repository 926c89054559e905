"""Detect what a graph cannot hold: draws on the host and changed Python attributes, with the line.

The file also keeps the Python values that a trace depends on, to see whether it is still valid.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import Transform
from gradfilter.grads._call_context import HostRandom
from gradfilter.grads._module_attributes import Attributes, remove
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._state_owners import FOREIGN, Added, holds_same_objects, owners_in
from gradfilter.transforms._read_values import ReadValues, roots_of


@dataclass(frozen=True, eq=False)
class HostState:
    """The Python state that a step depends on, at one moment.

    Attributes:
        parts: The attributes of the modules, of what criteria and plain losses refer to, and of
            what the functions of the transforms refer to.
        read: The values that all these functions read, and the modules that they may call.
    """

    parts: tuple[Attributes, ...]
    read: ReadValues

    @classmethod
    def now(
        cls,
        losses: Iterable[NormalizedLoss],
        updates: Iterable[Transform],
        owners: Iterable[Any] = (),
    ) -> HostState:
        """Record the present state."""
        losses, owners = list(losses), list(owners)
        values = [value for update in updates for value in _arguments(update)]
        found = [("update", owner) for value in values for owner in owners_in(value, names=True)]
        found += (("function", owner) for owner in owners)
        read = ReadValues.of([r for loss in losses for r in roots_of(loss)] + values + owners)
        parts = (*(loss.attributes for loss in losses), Attributes({}, (), found))
        return cls(parts, read)

    def changed(self) -> str | None:
        """Return the name of a value that has changed since, or None."""
        for attributes in self.parts:
            for name, before, now in attributes.changes():
                same = type(now) is list and holds_same_objects(before, now)
                if not same and not _are_weak(now):
                    return f"attribute {name!r}"
        return None

    def logged(self) -> list[Added]:
        """Return what was appended to lists since."""
        return [added for attributes in self.parts for added in attributes.added()]

    def restore(self) -> None:
        """Restore the values of that moment."""
        for attributes in self.parts:
            attributes.restore()

    @contextmanager
    def kept(self, run: Callable[[], Any]) -> Iterator[None]:
        """Refuse a trace that draws on the host or changes the state; restore both.

        Args:
            run: Runs the step again, to find the line.

        Raises:
            RuntimeError: It does one of them; the error names the line.
        """
        own = [generator for attributes in self.parts for generator in attributes.generators]
        start = _Start(self, HostRandom(own))
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        what = start.change()
        start.restore()
        if what is not None:
            line = _LineSearch(start.change).text(run)
            start.restore()
            raise RuntimeError(
                f"The step cannot be traced: {what}{line}. Draw with torch, keep what changes in "
                "the state of a transform or in a buffer, or call step(state, batch) without "
                "compiling it."
            ) from error
        if error is not None:
            raise error


@dataclass(frozen=True, eq=False)
class _Start:
    """Everything on the host that a trace must leave as it is."""

    state: HostState
    random: HostRandom
    numbers: Tensor = field(default_factory=torch.get_rng_state)
    seed: int = field(default_factory=torch.initial_seed)

    def change(self) -> str | None:
        """Return what the trace has done, or None."""
        generator = self.random.moved()
        if generator is not None:
            return f"it draws from {generator}, whose number would stay the same in every step"
        if torch.initial_seed() != self.seed:  # draws in a trace do not move the generator
            return "it seeds torch's generator, which would happen only once"
        name = self.state.changed() or ("a list, by appending" if self.state.logged() else None)
        return name and f"it changes {name}, which would happen only once"

    def restore(self) -> None:
        """Restore it."""
        self.random.restore()
        torch.set_rng_state(self.numbers)
        remove(self.state.logged())
        self.state.restore()


def _are_weak(value: Any) -> bool:
    """Return whether a list holds only weak references: to weights, in recurrent modules."""
    return type(value) is list and all(isinstance(item, weakref.ref) for item in value)


def _arguments(update: Transform) -> Iterator[Any]:
    """Yield the values that a transform was made from."""
    made = update.call
    values = list(update.parts) if made is None else [*made.args, *made.kwargs.values()]
    if made is None and not update.parts:
        yield from (update.compute, update.init)
    for value in values:
        if isinstance(value, Transform):
            yield from _arguments(value)
        elif not isinstance(value, Tensor):
            yield value


@dataclass(eq=False)
class _LineSearch:
    """A trace function that finds the first line after which something has changed.

    Attributes:
        changed: Returns a text if it has changed.
        last: The last line of the user's code that began.
        found: The line that was found.
    """

    changed: Callable[[], str | None]
    last: tuple[str, int] | None = None
    found: tuple[str, int] | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow the lines of the user's functions; Python calls this at every call."""
        return self.follow(frame, event, argument) if is_users_code(frame) else None

    def follow(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Compare before every line, and at the end of a function."""
        if self.found is None and self.last is not None and self.changed() is not None:
            self.found = self.last
        # A function that returns, also one that Python called by itself (a callback of the garbage
        # collector), leaves its caller in the middle of a line: what follows belongs to that line.
        at = frame if event == "line" else _users_caller(frame) if event == "return" else None
        if at is not None:
            self.last = at.f_code.co_filename, at.f_lineno
        return self.follow

    def text(self, run: Callable[[], Any]) -> str:
        """Run a function, and return the line as the end of a sentence."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            with suppress(Exception):
                run()
        finally:
            sys.settrace(before)
        return "" if self.found is None else f", in {self.found[0]}, line {self.found[1]}"


def _users_caller(frame: FrameType) -> FrameType | None:
    """Return the innermost of a frame's callers that runs the user's code."""
    caller = frame.f_back
    while caller is not None and not is_users_code(caller):
        caller = caller.f_back
    return caller


def is_users_code(frame: FrameType) -> bool:
    """Return whether a frame runs neither a library nor generated code."""
    name = str(frame.f_globals.get("__name__", ""))
    package = name.partition(".")[0]
    return package not in FOREIGN and not name.startswith("namedtuple_")
