"""Record the random numbers of a step that is traced, and repeat them in its repeated passes.

A repeated pass (the second pass of SAM, for example) draws the numbers of the first pass again. In
eager execution the generator is set back for it, which a graph cannot express. In a trace the drawn
numbers are values of the graph, and the repeated pass uses these values: the number of draws before
a moment takes the place of a generator's state. A graph can also return its numbers, and a later
graph take them, to repeat a pass of the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from gradfilter.grads._call_context import StepRandom, recorded

aten: Any = torch.ops.aten

UNTAGGED = {"random", "random_", "binomial", "_sample_dirichlet"}
"""Draws without torch's tag for them."""

NUMBERS = {
    *("bernoulli.p", "bernoulli_.float", "normal.float_float", "normal_functional"),
    *("rand", "rand_like", "randn", "randn_like", "randperm", "random", "random_", "uniform"),
    *("uniform_", "normal_", "cauchy", "cauchy_", "exponential", "exponential_", "geometric"),
    *("geometric_", "log_normal", "log_normal_", "randint", "randint_like"),
}
"""Draws that depend on no values of tensors: their result is the number to repeat."""


START = {"draws": 0}
"""The state before the first draw."""


class CannotRecord(RuntimeError):
    """Raised for a draw that a graph cannot hold."""


@dataclass(frozen=True)
class _Draw:
    """A draw.

    Attributes:
        call: The operation with its numbers.
        result: The numbers that were drawn; None if they cannot be repeated.
        index: The number of draws that ran before it; -1 if another graph ran it.
        attempt: The number of times that the position was set before it; -1 likewise.
    """

    call: tuple[Any, ...]
    result: Tensor | None
    index: int
    attempt: int


@dataclass(eq=False)
class RecordedDraws(StepRandom):
    """The draws of one step, in order.

    Attributes:
        draws: The draws so far, with those of other graphs that were taken.
        position: The number of draws before the next one; a repeated pass sets it back.
        forgotten: For every draw that ran, in order, whether the pass it belongs to was given up.
    """

    draws: list[_Draw] = field(default_factory=list)
    position: int = 0
    forgotten: list[bool] = field(default_factory=list)
    _attempt: int = 0

    @property
    def calls(self) -> tuple[Any, ...]:
        """The operations of the draws that ran here, each with its numbers."""
        return tuple(draw.call for draw in self.draws if draw.index >= 0)

    @property
    def results(self) -> list[Tensor | None]:
        """The numbers of these draws, for another graph to take."""
        return [draw.result for draw in self.draws if draw.index >= 0]

    def take(self, calls: Iterable[Any], results: Iterable[Tensor | None]) -> None:
        """Take the draws of another graph; a pass repeats them if it begins at this position.

        Args:
            calls: ``calls`` of the trace of that graph.
            results: The ``results`` that the graph returned.
        """
        assert self.position == len(self.draws)  # no pass is being repeated
        pairs = zip(calls, results, strict=True)
        self.draws += [_Draw(call, result, -1, -1) for call, result in pairs]
        self.position = len(self.draws)

    @override
    def state(self) -> dict[str, Any]:
        """Return the present position, in place of the states of generators."""
        return {"draws": self.position}

    @override
    def set(self, state: dict[str, Any]) -> None:
        """Set the position, so that the draws after it are repeated."""
        if "draws" not in state:
            raise CannotRecord(
                "a graph cannot set torch's generators to a state. Give the random state as the "
                "entry 'random' of the step's state"
            )
        self.position = state["draws"]
        self._attempt += 1

    @override
    def restore(self, state: dict[str, Any]) -> None:
        """Return to a position, at the end of a repeated pass."""
        self.set(state)

    @override
    def moment(self) -> None:
        """Record a moment: any number of them can be restored."""

    @override
    def forget(self, state: dict[str, Any]) -> None:
        """Forget the draws since a state: the pass that made them was given up."""
        start = state["draws"]
        if all(draw.attempt == self._attempt for draw in self.draws[start:]):
            for draw in self.draws[start:]:
                self.forgotten[draw.index] = True
            del self.draws[start:]

    def recorded(self) -> TorchDispatchMode:
        """Return the context that records and repeats draws."""
        return _DrawMode(self)

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a draw, or repeat the one at this position."""
        if kwargs.get("generator") is not None or any(
            isinstance(arg, torch.Generator) for arg in args
        ):
            raise CannotRecord(
                "a graph cannot draw from a torch.Generator of one's own, found one in "
                f"{_name(func)}. Draw from torch's default generators"
            )
        if torch._C._current_graph_task_id() != -1:
            raise CannotRecord(
                f"{_name(func)} draws random numbers in a backward pass, as activation "
                "checkpointing does; a graph would draw other ones than the forward pass"
            )
        call = (func, *map(_described, args), *map(_described, kwargs.items()))
        if self.position < len(self.draws):
            return self._repeat(call, args)
        result = func(*args, **kwargs)
        self.draws.append(
            _Draw(call, _repeatable(func, result), len(self.forgotten), self._attempt)
        )
        self.forgotten.append(False)
        self.position += 1
        return result

    def _repeat(self, call: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        draw = self.draws[self.position]
        func = call[0]
        if call != draw.call:
            raise CannotRecord(
                f"a repeated pass draws other random numbers ({_name(func)}) than the first one "
                f"({_name(draw.call[0])})"
            )
        self.position += 1
        if draw.result is None:
            raise CannotRecord(
                f"{_name(func)} mixes random numbers with values, and a repeated pass cannot draw "
                "the same numbers with other values"
            )
        if func is aten.native_dropout.default:
            mask, p = draw.result, args[1]
            return args[0] * mask * (0.0 if p == 1 else 1 / (1 - p)), mask
        return args[0].copy_(draw.result) if _name(func).endswith("_") else draw.result.clone()


def _repeatable(func: Any, result: Any) -> Tensor | None:
    """Return a copy of the numbers that a draw gave, or None if they cannot be told from values.

    A copy, because a later operation may write into them: dropout scales its mask in place.
    """
    if func is aten.native_dropout.default:
        result = result[1]  # the mask
    elif _name(func) not in NUMBERS and f"{_name(func)}.{func._overloadname}" not in NUMBERS:
        return None
    found: Tensor = result.clone()
    return found


def present_draws() -> RecordedDraws:
    """Return the draws of the step that is being traced."""
    numbers = recorded()
    assert isinstance(numbers, RecordedDraws)  # the caller runs in a trace
    return numbers


class _DrawMode(TorchDispatchMode):
    """Send every draw to a `RecordedDraws`."""

    def __init__(self, draws: RecordedDraws) -> None:
        mode: Any = super()  # torch's class is not annotated
        mode.__init__()
        self._draws = draws

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function; record or repeat it if it draws."""
        kwargs = kwargs or {}
        if not is_draw(func) or draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        return self._draws.draw(func, args, kwargs)


def is_draw(func: Any) -> bool:
    """Return whether an operation may draw random numbers."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in func.tags or (
        func.namespace == "aten" and func._schema.name.removeprefix("aten::") in UNTAGGED
    )


def draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation with an optional dropout is called without it."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        value = given.get(argument.name, argument.default_value)
        if argument.name in ("dropout", "dropout_p") and value == 0:
            return True
        if argument.name in ("train", "training") and value is False:
            return True
    return False


def _described(argument: Any) -> Any:
    """Return what must be the same in a repeated draw: shape and dtype of a tensor, or a number."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        return tuple(map(_described, argument))
    return argument


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")
