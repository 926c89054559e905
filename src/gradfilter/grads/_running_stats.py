"""Record the batch statistics of each row in plan "vmap", then replay them in order.

Under vmap the M rows run at once, while running statistics are a recurrence over the rows,
r ← (1 − a) r + a s_m. Within one training-mode forward pass nothing reads r, so the pass can run
without it. The batch statistics s_m are kept, and the recurrence runs afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.grads._buffer_watch import BufferWatch
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused.overrides._embedding import LOOKUPS, refuse_sparse
from gradfilter.grads.fused.overrides._vmap_faults import UNDER_ANY_VMAP

BATCH_NORM = inspect.signature(F.batch_norm)
STATISTICS = ("running_mean", "running_var")
"""The arguments that are buffers."""


@dataclass
class Recorded:
    """The changes of buffers in one forward pass: tensors, and values known without them."""

    # Per call of batch_norm: (name of the mean, name of the variance, momentum), (s_mean, s_var).
    calls: list[tuple[str, str, float]] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class RecordRunningStats(TorchFunctionMode):
    """Run batch_norm without its running statistics, and record their updates."""

    def __init__(
        self,
        buffers: Tree,
        cumulative: set[str],
        attributes: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """Take the tensors to watch."""
        super().__init__()
        self._watch = BufferWatch(buffers, cumulative, attributes)
        self.recorded = Recorded()

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept batch_norm; record the buffers that other functions use."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in LOOKUPS:
            refuse_sparse(func, args, kwargs)
        if func in UNDER_ANY_VMAP:
            result = UNDER_ANY_VMAP[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._watch.note(func, args, kwargs)
        return under_autocast(func)(*args, **kwargs)

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        call = BATCH_NORM.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        mean_name, var_name = (self._watch.name(given[key]) for key in STATISTICS)
        if mean_name is not None and var_name is not None:
            if given["training"]:
                x = _tree.at_least_float32(given["input"].detach())
                var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=1)
                self.recorded.calls.append((mean_name, var_name, given["momentum"]))
                self.recorded.moments.append((mean, var))
                given.update(dict.fromkeys(STATISTICS))
            else:
                self._watch.read(mean_name, var_name)
        y: Tensor = under_autocast(F.batch_norm)(*given.values())
        return y

    @property
    def used_attributes(self) -> set[str]:
        """Return the names of the attributes that were used."""
        return self._watch.used_attributes

    def check(self, after: Tree) -> None:
        """Refuse changes that cannot be replayed, given the buffers after the forward pass."""
        self._watch.check(after, {name for call in self.recorded.calls for name in call[:2]})


def replay(
    buffers: Tree,
    counters: Tree,
    recorded: Recorded,
    moments: list[tuple[Tensor, Tensor]],
    cumulative: set[str],
) -> Tree:
    """Return the buffers after M forward passes in order.

    Args:
        buffers: The buffers before the first row.
        counters: All ``num_batches_tracked`` after one forward pass, stacked (M,).
        recorded: The record of the pass.
        moments: The mean and unbiased variance of each call, (M, C) each.
        cumulative: The running means with momentum None.
    """
    after = dict(buffers)
    if moments:
        for m in range(len(moments[0][0])):
            seen: dict[str, int] = {}
            for (mean, var, momentum), (s_mean, s_var) in zip(recorded.calls, moments, strict=True):
                rate: float | Tensor = momentum
                if mean in cumulative:
                    tracked = mean.replace("running_mean", "num_batches_tracked")
                    seen[mean] = seen.get(mean, 0) + 1
                    per_pass = counters[tracked][0] - buffers[tracked]
                    passes = buffers[tracked] + m * per_pass + seen[mean]
                    rate = 1 / _tree.scalar(passes, passes)
                after[mean] = _average(after[mean], s_mean[m], rate)
                after[var] = _average(after[var], s_var[m], rate)
    for name, counter in counters.items():
        after[name] = buffers[name] + len(counter) * (counter[0] - buffers[name])
    return after


def _average(old: Tensor, new: Tensor, rate: float | Tensor) -> Tensor:
    return (1 - rate) * old + rate * new.to(old.dtype)
