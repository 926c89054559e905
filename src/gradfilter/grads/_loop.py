"""Plan "loop": M ordinary backward passes, one after the other. Tests use it as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._call_context import Versions
from gradfilter.grads._loss import RefusedByAll, unreached_error
from gradfilter.grads._module_tensors import Hook
from gradfilter.grads._normalized_loss import GraphEnds, NormalizedLoss
from gradfilter.grads._one_image import one_image
from gradfilter.grads._writes import WriteWatch

# What a plan returns: rows (M, *shape) by name, losses (M,), buffers after all rows, aux (M, ...).
Rows = tuple[Tree, Tensor, Tree, Any]


def loop_rows(loss: NormalizedLoss, params: Params, batch: Batch, per_row: bool) -> Rows:
    """Compute row m by an ordinary backward pass over microbatch m; pass buffers from row to row.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: The rows.
        per_row: True if every row has its own parameters.
    """
    with one_image(batch, loss.modules):
        return _rows(loss, params, batch, per_row)


def _rows(loss: NormalizedLoss, params: Params, batch: Batch, per_row: bool) -> Rows:
    count, buffers = batch.count, batch.buffers
    shapes = {name: p.shape[1:] if per_row else p.shape for name, p in params.items()}
    # Write row by row, because stacking M finished gradients would hold all of them twice.
    rows = {name: p.new_empty((count, *shapes[name])) for name, p in params.items()}
    losses, aux, reached = [], [], False
    for m in range(count):
        leaves = {name: loss.leaf(name, p[m] if per_row else p) for name, p in params.items()}
        loss.hook(leaves)
        before = buffers
        with torch.enable_grad(), refuse_writes(loss, leaves):
            # Copy, because a first layer that works in place would write into the batch.
            row = batch.rebuild(t[m].clone() for t in batch.tensors)
            value, buffers, extra = loss.pure_and_clean(leaves, row, before)
        grads = _gradients(loss, value, leaves, before)
        for name, grad in zip(leaves, grads, strict=True):
            reached = reached or grad is not None
            if grad is None:
                rows[name][m].zero_()
            else:
                rows[name][m] = grad.to_dense() if grad.is_sparse else grad
        losses.append(value.detach())
        aux.append(extra if extra is None else _tree.tree_map(torch.Tensor.detach, extra))
        buffers = {name: b.detach() for name, b in buffers.items()}
        loss.clean_attributes(leaves)
        if not per_row:
            params = {**params, **loss.renormalised(params, leaves)}
    if not reached:
        raise unreached_error()
    stacked = None if aux[0] is None else _tree.tree_map(lambda *t: torch.stack(t), *aux)
    return rows, torch.stack(losses), buffers, stacked


def _gradients(
    loss: NormalizedLoss, value: Tensor, leaves: Params, buffers: Tree
) -> Sequence[Tensor | None]:
    """Compute the gradient of one row for every leaf; None if the loss does not use it."""
    # One row may be constant, for example without labels, but not all of them.
    if not value.requires_grad:
        return (None,) * len(leaves)
    ends = loss.ends(value, leaves.values())
    if ends.reentrant:
        return _reentrant(loss, value, leaves, buffers, ends)
    with loss.module_state(leaves, buffers):
        return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)


def _reentrant(
    loss: NormalizedLoss, value: Tensor, leaves: Params, buffers: Tree, ends: GraphEnds
) -> list[Tensor | None]:
    """Compute the same through a reentrant checkpoint, which needs accumulated gradients."""
    own = {} if loss.places is None else loss.places.trainable
    bystanders = [*own.values(), *ends.others]
    kept = [p.grad for p in bystanders]
    for p in bystanders:
        p.grad = None
    backward: Any = value.backward  # torch does not type it
    try:
        with loss.module_state(leaves, buffers):
            backward()
        for name, p in own.items():
            if p.grad is not None:
                raise loss.bypassed(name, p)
    finally:
        for p, grad in zip(bystanders, kept, strict=True):
            p.grad = grad
    return [leaf.grad for leaf in leaves.values()]


@contextmanager
def refuse_writes(
    loss: NormalizedLoss, leaves: Params, hook_methods: list[str] | None = None
) -> Iterator[None]:
    """Refuse a forward pass that writes into the parameters it is given, or hooks on them.

    Args:
        loss: The loss.
        leaves: The parameters that it is given.
        hook_methods: A list that gets the names of methods that hook on other tensors.
    """
    guarded = list(loss.untouchable(leaves))
    versions = Versions(guarded)
    with WriteWatch(guarded, written_parameter) as watch:
        yield
    if hook_methods is not None:
        hook_methods.extend(watch.hook_methods)
    name = versions.written()  # writes that no Python function shows
    if name is not None:
        raise written_parameter(name)
    refuse_new_hooks(leaves, loss.hooks)


def refuse_new_hooks(leaves: Params, hooks: Mapping[str, list[Hook]] | None = None) -> None:
    """Refuse leaves that got new hooks in the forward pass."""
    for name, leaf in leaves.items():
        if len(leaf._backward_hooks or ()) > len((hooks or {}).get(name, ())):
            raise hooked_parameter(name)


def hooked_parameter(name: str) -> RefusedByAll:
    """Return the error for a loss that registers a hook on a parameter."""
    return RefusedByAll(
        f"Expected a loss that registers no hook on a parameter, found one on {name!r} registered "
        "in the forward pass: one more at every pass. Register it once, before training."
    )


def written_attribute(name: str) -> RuntimeError:
    """Return the error for a pass over all rows in which the loss writes into an attribute."""
    return RuntimeError(
        f"the loss writes into attribute {name!r} of a module, which cannot be handed from row to "
        "row. Make it a buffer (register_buffer)"
    )


def written_parameter(name: str) -> RefusedByAll:
    """Return the error for a loss that writes into a parameter."""
    return RefusedByAll(
        f"Expected a loss that leaves its parameters as they are, found the {name} written in "
        "place in the forward pass. A gradient is taken at the parameters that are given: write "
        "w = self.weight.clamp(...) there, use torch.nn.utils.parametrize, or constrain the "
        "parameters after the update."
    )
