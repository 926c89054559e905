"""BatchNorm's running statistics in the fused plan: the very kernel of the loop, row after row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import Tree
from gradfilter.grads._buffer_watch import BufferWatch

Update = Callable[[int], tuple[Tensor | None, Tensor | None, float]]
"""Row m -> the statistics to update in place and the momentum to do it with."""


Kernel = Callable[[Tensor, Tensor | None, Tensor | None, float], Any]
"""Updates a running mean and variance, in place, by one row."""


@dataclass(frozen=True)
class _Call:
    mean: str
    var: str
    momentum: float
    x: Tensor
    kernel: Kernel


@dataclass
class RunningUpdates:
    """Running statistics after all rows, bit for bit as after M forward passes in order.

    A BatchNorm that is used once in a pass updates them while its rows are computed. For one that
    is used more often the order would be wrong, call by call instead of row by row: its statistics
    are taken once more in the end.

    Attributes:
        watch: Knows the buffers by identity.
        buffers: The buffers as the model sees them, which stay as they came.
        cumulative: Running means with momentum None: averages over all passes, a = 1/t.
        updated: The running statistics so far.
    """

    watch: BufferWatch
    buffers: Tree
    cumulative: set[str]
    updated: Tree = field(default_factory=dict)
    _calls: list[_Call] = field(default_factory=list)

    def read(self, *statistics: Tensor | None) -> None:
        """Note that statistics were used as they are."""
        self.watch.read(*(name for s in statistics if (name := self.watch.name(s)) is not None))

    def start(
        self,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float,
        x: Tensor,
        kernel: Kernel = torch.batch_norm_update_stats,
    ) -> Update:
        """Begin one call of batch_norm on (M, B, C, ...)."""
        if mean is None or var is None:
            return lambda m: (None, None, momentum)
        names = self.watch.name(mean), self.watch.name(var)
        if names[0] is None or names[1] is None:
            raise RuntimeError(
                "batch_norm updates running statistics that are no buffers of the model"
            )
        call = _Call(names[0], names[1], momentum, x.detach(), kernel)
        self._calls.append(call)
        for name in (call.mean, call.var):
            self.updated[name] = self.buffers[name].clone()
        own = self.updated[call.mean], self.updated[call.var]
        return lambda m: (*own, self._momentum(call, m, 1))

    def finish(self) -> Tree:
        """The updated statistics."""
        for mean in {call.mean for call in self._calls}:
            calls = [call for call in self._calls if call.mean == mean]
            if len(calls) > 1:
                self._again(calls)
        self._calls.clear()
        return self.updated

    def _again(self, calls: list[_Call]) -> None:
        own = self.buffers[calls[0].mean].clone(), self.buffers[calls[0].var].clone()
        for m in range(len(calls[0].x)):
            for call in calls:
                momentum = self._momentum(call, m, len(calls))
                call.kernel(call.x[m], *own, momentum)
        self.updated[calls[0].mean], self.updated[calls[0].var] = own

    def _momentum(self, call: _Call, m: int, uses: int) -> float:
        if call.mean not in self.cumulative:
            return call.momentum
        # The module counts one pass where there are M, and gives 1/t of the first.
        return 1 / (round(1 / call.momentum) + m * uses)
