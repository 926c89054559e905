"""What happens to the state of a transform in a skipped step, and to counters that the host reads.

A skipped step leaves states as they were, except for transforms that observe: a memory of past
norms would otherwise keep a rule from accepting again after many rejected steps. Counters of calls
observe as well. They are tensors on the CPU, so that the host reads them without waiting for a
device; a graph, which has no values to read, gets the decisions in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter._tree import select

COUNTER = "calls"
"""The name of a counter in a state: the number of calls, skipped steps included. () int64, CPU."""

RUNS, RESTS = "runs", "rests"
"""What stands in place of a counter while a step is traced."""


class StateRules(Protocol):
    """The rules for the state of a transform that observes, or that contains one that does."""

    def settled(self, keep: Tensor | bool, new: Any, old: Any) -> Any:
        """Return the state after a step: ``new``, or if ``keep`` is false what observed in it."""
        ...

    def decisions(self, state: Any) -> Iterator[bool]:
        """Yield for each counter whether its transform runs in the next call."""
        ...

    def decided(self, state: Any) -> Any:
        """Return the state with decisions in place of counters."""
        ...

    def counted(self, new: Any, old: Any) -> Any:
        """Return a state with decisions as a state with counters, one call after ``old``."""
        ...


def settled(rules: StateRules | None, keep: Tensor | bool, new: Any, old: Any) -> Any:
    """Return the state after a step that may be skipped."""
    return select(keep, new, old) if rules is None else rules.settled(keep, new, old)


@dataclass(frozen=True)
class Observing(StateRules):
    """The whole state observes: it is the new one, also after a skipped step."""

    @override
    def settled(self, keep: Tensor | bool, new: Any, old: Any) -> Any:
        return new

    @override
    def decisions(self, state: Any) -> Iterator[bool]:
        return iter(())

    @override
    def decided(self, state: Any) -> Any:
        return state

    @override
    def counted(self, new: Any, old: Any) -> Any:
        return new


@dataclass(frozen=True)
class PartRules(StateRules):
    """The state is a dict, and some of its entries have rules.

    Attributes:
        parts: The rules by entry; the other entries have none.
    """

    parts: Mapping[str, StateRules]

    @classmethod
    def of(cls, parts: Mapping[str, StateRules | None]) -> PartRules | None:
        """Return the rules of a dict of states; None if no entry has rules."""
        found = {name: rules for name, rules in parts.items() if rules is not None}
        return cls(found) if found else None

    @override
    def settled(self, keep: Tensor | bool, new: Any, old: Any) -> Any:
        return {name: settled(self.parts.get(name), keep, new[name], old[name]) for name in new}

    @override
    def decisions(self, state: Any) -> Iterator[bool]:
        for name, rules in self.parts.items():
            yield from rules.decisions(state[name])

    @override
    def decided(self, state: Any) -> Any:
        return state | {name: rules.decided(state[name]) for name, rules in self.parts.items()}

    @override
    def counted(self, new: Any, old: Any) -> Any:
        found = {name: rules.counted(new[name], old[name]) for name, rules in self.parts.items()}
        return new | found


@dataclass(frozen=True, eq=False)
class CounterRules(StateRules):
    """The state has a counter of calls, by which the host decides what runs in a call.

    Attributes:
        runs: Whether the transform runs in the call of this number.
        inner: The rules for the other entries.
    """

    runs: Callable[[int], bool]
    inner: PartRules

    def decide(self, state: Any) -> bool:
        """Return whether the transform runs in this call."""
        if COUNTER in state:
            return self.runs(read_counter(state[COUNTER]))
        return RUNS in state

    def call(self, state: Any) -> tuple[bool, dict[str, Any]]:
        """Return whether the transform runs in this call, and the counter's entry after it."""
        runs = self.decide(state)
        if COUNTER in state:
            return runs, {COUNTER: state[COUNTER] + 1}
        return runs, {RUNS if runs else RESTS: {}}

    @override
    def settled(self, keep: Tensor | bool, new: Any, old: Any) -> Any:
        # The counter stays out of it: on the CPU, it would wait for a `keep` of another device.
        rest = {name: part for name, part in new.items() if name != COUNTER}
        counter = {COUNTER: new[COUNTER]} if COUNTER in new else {}  # there is none in a trace
        found = self.inner.settled(keep, rest, old) | counter
        return {name: found[name] for name in new}

    @override
    def decisions(self, state: Any) -> Iterator[bool]:
        yield self.decide(state)
        yield from self.inner.decisions(state)

    @override
    def decided(self, state: Any) -> Any:
        rest = {name: part for name, part in state.items() if name != COUNTER}
        return {RUNS if self.decide(state) else RESTS: {}, **self.inner.decided(rest)}

    @override
    def counted(self, new: Any, old: Any) -> Any:
        ran = "transform" if RUNS in new else "otherwise"
        rest = {name: part for name, part in new.items() if name not in (RUNS, RESTS)}
        parts = {  # counters inside what rested wait with it
            name: rules.counted(new[name], old[name]) if name == ran else old[name]
            for name, rules in self.inner.parts.items()
        }
        return {COUNTER: old[COUNTER] + 1, **rest, **parts}


def new_counter() -> Tensor:
    """Return the counter before the first call."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def read_counter(count: Tensor) -> int:
    """Return the number of a counter.

    Raises:
        RuntimeError: It has no number that the host can read without waiting.
    """
    try:
        return int(count.numpy())  # unlike .item(), it never waits for a device
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(
            "Expected the counter of every(), late() or look_sam() as a tensor on the CPU that the "
            f"host can read, found one on {count.device} inside a trace, torch.func.vmap or a "
            "capture, or moved there. Keep the state where init made it, and compile a step of "
            "train_step with gradfilter.compile."
        ) from error
