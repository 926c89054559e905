"""Compute all rows at once with ``torch.func.vmap(torch.func.grad_and_value(loss))``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from torch.func import grad_and_value, vmap

from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._call_context import Versions
from gradfilter.grads._loop import Rows, refuse_new_hooks, written_attribute, written_parameter
from gradfilter.grads._loss import check_differentiable
from gradfilter.grads._module_tensors import apply_hooks
from gradfilter.grads._normalized_loss import NormalizedLoss, as_parameter
from gradfilter.grads._running_stats import Recorded, RecordRunningStats, replay
from gradfilter.grads._seeds import Seeds, SeedWatch
from gradfilter.grads._writes import WriteWatch


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
    after = replay(batch.buffers, counters, row.recorded, moments, loss.cumulative)
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
    recorded: Recorded = field(default_factory=Recorded)

    def evaluate(
        self, params: Params, tensors: list[Tensor], buffers: Tree
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the loss, and (counters, moments, aux) of the row."""
        loss, own = self.loss, {name: b.clone() for name, b in buffers.items()}
        for p in params.values():
            as_parameter(p)
        with RecordRunningStats(own, loss.cumulative, loss.attribute_tensors()) as mode:
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
