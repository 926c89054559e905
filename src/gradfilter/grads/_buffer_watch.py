"""Watch the buffers during a pass over all rows, and update running statistics row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfilter._types import Tree
from gradfilter.grads._writes import tensor_property

# --- Watch what a pass does to buffers ---


COUNTER = "num_batches_tracked"

DATA = tensor_property("data").__get__

VIEWS = {tensor_property(name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")}
"""Properties that give access to a tensor's values; all others give only its description."""

HANDED_OUT = {"numpy", "__array__", "untyped_storage", "data_ptr", "__dlpack__", "set_"}
"""Methods that expose a buffer's memory, so that writes to it cannot be detected."""

ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
}


class BufferWatch:
    """Follows buffers, known by identity, through one forward pass.

    All rows run at once, so a buffer cannot be passed from row to row. BatchNorm's running
    statistics and counters are updated afterwards. Every other write is refused, and every other
    use of statistics and counters that were written.

    Args:
        buffers: The buffers of this pass.
        cumulative: The running means with momentum None, whose counters torch's BatchNorm reads.
        attributes: Other tensors whose use is recorded.

    Attributes:
        used_attributes: The names of those other tensors that were used.
        has_tensors: True if there is any tensor to follow.
    """

    def __init__(
        self,
        buffers: Tree,
        cumulative: Collection[str] = (),
        attributes: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        self._buffers = buffers
        self._read_by_torch = {name.removesuffix("running_mean") + COUNTER for name in cumulative}
        self._names = {id(b): name for name, b in buffers.items()}
        self._versions = {name: b._version for name, b in buffers.items()}
        self._used: set[str] = set()
        self._attributes: dict[int, set[str]] = {}  # one tensor may be in several
        for name, tensor in attributes:
            self._attributes.setdefault(id(tensor), set()).add(name)
        self.used_attributes: set[str] = set()
        self.has_tensors = bool(self._names or self._attributes)

    def name(self, value: Any) -> str | None:
        """Return the name of a buffer, or None for another value."""
        return self._names.get(id(value))

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the buffers that a function uses, and refuse writes that cannot be detected."""
        if not self.has_tensors:
            return
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if func not in VIEWS:  # reading a tensor's shape does not use its values
                return
            if func == DATA and (exposed := self.name(args[0])) is not None:
                raise Unreplayable(exposed, "or may write through .data")
        listed = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]
        given = (*args, *listed, *kwargs.values())
        found = {self.name(x) for x in given} - {None}
        if self._attributes:
            for x in given:
                self.used_attributes |= self._attributes.get(id(x), frozenset())
        written = self.name(kwargs.get("out"))
        if written is not None:
            raise Unreplayable(written, f"as out= of {name}")
        if name in HANDED_OUT and found:
            raise Unreplayable(str(found.pop()), f"or may write through .{name}()")
        self._used |= {str(b) for b in found if not self._counts(str(b), func, args, kwargs)}
        if name.startswith("_foreach") and found:  # does not raise the version
            raise Unreplayable(str(found.pop()), f"by {name}")

    def _counts(self, name: str, func: Any, args: Any, kwargs: Any) -> bool:
        """Return whether a function only adds to a counter, or is BatchNorm's reading of it."""
        if not name.endswith(COUNTER):
            return False
        if func in ADDITIONS and not kwargs and len(args) == 2:
            return isinstance(args[1], int)
        return name in self._read_by_torch and func is torch.Tensor.__float__

    def read(self, *buffers: str) -> None:
        """Record that running statistics were read."""
        self._used |= set(buffers)

    def check(self, after: Tree, updated: set[str], handed: Collection[str] = ()) -> None:
        """Refuse changes of buffers that cannot be repeated afterwards.

        Args:
            after: The buffers after the forward pass.
            updated: The running statistics that the pass should update.
            handed: The buffers that were passed from row to row.
        """
        for name, buffer in self._buffers.items():
            if name in handed:
                continue
            replaced = after[name] is not buffer
            written = replaced or buffer._version != self._versions[name]
            if name.endswith(COUNTER):
                if written and name in self._used:
                    raise Unreplayable(name, "and also reads")
            elif written:
                raise Unreplayable(name, "by assignment" if replaced else "in place")
        for name in sorted(self._used & updated.union(handed)):
            raise Unreplayable(name, "and also reads")


class Unreplayable(RuntimeError):
    """Raised if a buffer prevents rows from running at once.

    Attributes:
        buffer: The buffer's name.
    """

    def __init__(self, buffer: str, how: str) -> None:
        super().__init__(
            f"A pass over all rows at once cannot hand buffer {buffer!r}, which the forward pass "
            f'writes {how}, from row to row. Use plan="loop".'
        )
        self.buffer = buffer


def cumulative_means(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of running means whose momentum is None: cumulative averages, a = 1/t."""
    return {
        f"{prefix}.running_mean" if prefix else "running_mean"
        for prefix, module in modules.items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.momentum is None
        # A subclass with its own forward pass may use the counter differently.
        and type(module).forward is nn.modules.batchnorm._BatchNorm.forward
    }


# --- Running statistics in the fused plan: the kernel of the loop, row by row ---


class RunningStatistics(NamedTuple):
    """The running statistics that one row updates in place."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float


Kernel = Callable[[Tensor, Tensor | None, Tensor | None, float], Any]
"""``kernel(x, mean, var, momentum)`` updates the running mean and variance in place."""


@dataclass(frozen=True)
class _Call:
    mean: str
    var: str
    momentum: float
    x: Tensor | None
    kernel: Kernel


@dataclass
class RunningUpdates:
    """Running statistics after all rows, bit for bit as after M forward passes in order.

    A BatchNorm that is used once in a pass updates them while its rows are computed. If it is used
    more often, the order would be wrong (call by call instead of row by row), so its statistics are
    computed again at the end.

    Attributes:
        watch: The watch, which finds buffers by identity.
        buffers: The buffers as the model sees them; they are not changed.
        cumulative: The running means with momentum None: averages over all passes, a = 1/t.
        updated: The running statistics so far.
    """

    watch: BufferWatch
    buffers: Tree
    cumulative: set[str]
    updated: Tree = field(default_factory=dict)
    _calls: list[_Call] = field(default_factory=list)

    def read(self, *statistics: Tensor | None) -> None:
        """Record that statistics were used without an update."""
        self.watch.read(*(name for s in statistics if (name := self.watch.name(s)) is not None))

    def start(
        self,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float,
        x: Tensor,
        kernel: Kernel = torch.batch_norm_update_stats,
        *,
        hold: bool = True,
    ) -> list[RunningStatistics]:
        """Begin one call of batch_norm on (M, B, C, ...). Return the statistics of every row.

        The input is held for the end of the pass, unless ``hold`` is False; then the layer must not
        be used again.
        """
        if mean is None or var is None:
            return [RunningStatistics(None, None, momentum)] * len(x)
        names = self.watch.name(mean), self.watch.name(var)
        if names[0] is None or names[1] is None:
            raise RuntimeError(
                "batch_norm updates running statistics that are not buffers of the model"
            )
        call = _Call(names[0], names[1], momentum, x.detach() if hold else None, kernel)
        self._calls.append(call)
        for name in (call.mean, call.var):
            self.updated[name] = self.buffers[name].clone()
        own = self.updated[call.mean], self.updated[call.var]
        return [RunningStatistics(*own, self._momentum(call, m, 1)) for m in range(len(x))]

    def finish(self) -> Tree:
        """Return the updated statistics."""
        for mean in {call.mean for call in self._calls}:
            calls = [call for call in self._calls if call.mean == mean]
            if len(calls) > 1:
                self._repeat_in_order(calls)
        self._calls.clear()
        return self.updated

    def _repeat_in_order(self, calls: list[_Call]) -> None:
        own = self.buffers[calls[0].mean].clone(), self.buffers[calls[0].var].clone()
        inputs = [call.x for call in calls if call.x is not None]
        if len(inputs) < len(calls):
            raise Unreplayable(calls[0].mean, "inside of a checkpoint and once more")
        for m in range(len(inputs[0])):
            for call, x in zip(calls, inputs, strict=True):
                momentum = self._momentum(call, m, len(calls))
                call.kernel(x[m], *own, momentum)
        self.updated[calls[0].mean], self.updated[calls[0].var] = own

    def _momentum(self, call: _Call, m: int, uses: int) -> float:
        if call.mean not in self.cumulative:
            return call.momentum
        # The module counts one pass instead of M, and its momentum is 1/t of the first row.
        return 1 / (round(1 / call.momentum) + m * uses)
