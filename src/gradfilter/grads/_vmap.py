"""Compute all rows at once with ``torch.func.vmap(torch.func.grad_and_value(loss))``.

Running statistics are a recurrence over the rows, r ← (1 − a) r + a s_m, and here the M rows run at
once. Within one forward pass in training mode nothing reads r, so the pass runs without it. The
batch statistics s_m are recorded, and the recurrence runs afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from torch.func import grad_and_value, vmap
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._buffer_watch import BufferWatch
from gradfilter.grads._call_context import Versions
from gradfilter.grads._loop import Rows, refuse_new_hooks, written_attribute, written_parameter
from gradfilter.grads._loss import check_differentiable
from gradfilter.grads._module_tensors import apply_hooks
from gradfilter.grads._normalized_loss import NormalizedLoss, as_parameter
from gradfilter.grads._seeds import Seeds, SeedWatch
from gradfilter.grads._writes import WriteWatch
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused.overrides._embedding import LOOKUPS, refuse_sparse
from gradfilter.grads.fused.overrides._vmap_faults import UNDER_ANY_VMAP


def vmap_rows(
    loss: NormalizedLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    *,
    chunk_size: int | None,
    used: set[str],
) -> Rows:
    """Compute the rows of plan "loop" together.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: The rows.
        per_row: True if every row has its own parameters.
        chunk_size: The number of rows computed at a time; None for all of them.
        used: A set that gets the names of the tensors in attributes that the loss uses.
    """
    row = _RowLoss(loss, batch, used)
    guarded = [(f"parameter {name!r}", p) for name, p in params.items()]
    versions = Versions(guarded)
    try:
        seeds = Seeds(generator for _, generator in loss.attributes.generators)
        with WriteWatch([*loss.attribute_tensors(), *guarded], _written), SeedWatch(seeds):
            rows, (losses, (counters, moments, aux)) = vmap(
                grad_and_value(row.evaluate, has_aux=True),
                in_dims=(0 if per_row else None, 0, None),
                randomness="different",
                chunk_size=chunk_size,
            )(params, [t.clone() for t in batch.tensors], batch.buffers)
    finally:
        loss.clean_attributes(row.leaves, _last_row)
    if (name := versions.written()) is not None:
        raise written_parameter(name)
    if losses.requires_grad:  # the graph of another tensor than the given parameters
        loss.ends(losses, ())
    after = _replay(batch.buffers, counters, row.recorded, moments, loss.cumulative)
    for name, hooks in loss.hooks.items():
        if name in rows:
            rows[name] = apply_hooks(rows[name], hooks)
    # The loss has a graph of another tensor than the parameters, such as a module that it holds.
    rows = {name: leaf.detach() for name, leaf in rows.items()}
    return rows, losses.detach(), after, aux[0] if aux else None


def _written(name: str) -> Exception:
    """Return the error for a loss that writes into a parameter or into an attribute."""
    is_parameter = name.startswith("parameter ")  # no dotted name holds a space
    return written_parameter(name) if is_parameter else written_attribute(name)


@dataclass(eq=False)
class _RowLoss:
    """The loss of one row under vmap, and what its evaluation leaves.

    Attributes:
        loss: The loss.
        batch: All rows.
        used: The names of the tensors in attributes that the loss has used.
        leaves: The row's view of the parameters.
        recorded: The changes of running statistics.
    """

    loss: NormalizedLoss
    batch: Batch
    used: set[str]
    leaves: Tree = field(default_factory=dict)
    recorded: _Recorded = field(default_factory=lambda: _Recorded())

    def evaluate(
        self, params: Params, tensors: list[Tensor], buffers: Tree
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the loss, and (counters, moments, aux) of the row."""
        loss, own = self.loss, {name: b.clone() for name, b in buffers.items()}
        for p in params.values():
            as_parameter(p)
        with _RecordRunningStats(own, loss.cumulative, loss.attribute_tensors()) as mode:
            self.leaves.update(params)
            value, after, aux = loss.writing(params, self.batch.rebuild(tensors), own)
        check_differentiable(value)
        refuse_new_hooks(params)
        self.recorded = mode.recorded
        self.used.update(mode.used_attributes)
        mode.check(after)
        counters = {name: b for name, b in after.items() if name.endswith("num_batches_tracked")}
        return value, (counters, mode.recorded.moments, () if aux is None else (aux,))


def _last_row(tensor: Tensor) -> Tensor:
    """Return the tensor that a module holds after M passes in order: that of the last row."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        place = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor if place is None else tensor.select(place, -1)
    return tensor.detach()


# --- Running statistics ---


_BATCH_NORM = inspect.signature(F.batch_norm)
_STATISTICS = ("running_mean", "running_var")
"""The arguments that are buffers."""


@dataclass
class _Recorded:
    """The changes of buffers in one forward pass: tensors, and values known without them."""

    # Per call of batch_norm: (name of the mean, name of the variance, momentum), (s_mean, s_var).
    calls: list[tuple[str, str, float]] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _RecordRunningStats(TorchFunctionMode):
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
        self.recorded = _Recorded()

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
        call = _BATCH_NORM.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        mean_name, var_name = (self._watch.name(given[key]) for key in _STATISTICS)
        if mean_name is not None and var_name is not None:
            if given["training"]:
                x = _tree.at_least_float32(given["input"].detach())
                var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=1)
                self.recorded.calls.append((mean_name, var_name, given["momentum"]))
                self.recorded.moments.append((mean, var))
                given.update(dict.fromkeys(_STATISTICS))
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


def _replay(
    buffers: Tree,
    counters: Tree,
    recorded: _Recorded,
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
