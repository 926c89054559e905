"""Plan "loop": M ordinary backward passes, one after the other. The oracle of every other plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._batch import Batch
from gradfilter.grads._check_loss import unreached

# loss(params, batch, buffers) -> (scalar, new buffers, aux), none of its arguments changed.
PureLoss = Callable[[Params, Any, Tree], tuple[Tensor, Tree, Any]]

# What a plan returns: rows (M, *shape) by name, losses (M,), buffers after all rows, aux (M, ...).
Rows = tuple[Tree, Tensor, Tree, Any]


def loop_rows(
    loss: AnyLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
) -> Rows:
    """Row m from an ordinary backward pass over microbatch m, buffers handed from row to row.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: The rows.
        per_row: Row m has its own parameters.
    """
    count, buffers = len(batch), batch.buffers
    shapes = {name: p.shape[1:] if per_row else p.shape for name, p in params.items()}
    # Written row by row: stacking M finished gradients would hold all of them twice.
    rows = {name: p.new_empty((count, *shapes[name])) for name, p in params.items()}
    losses, aux, reached = [], [], False
    for m in range(count):
        leaves = {name: loss.leaf(name, p[m] if per_row else p) for name, p in params.items()}
        before = buffers
        with torch.enable_grad():
            value, buffers, extra = loss.pure(
                leaves, batch.rebuild(t[m] for t in batch.tensors), before
            )
        differentiate = partial(
            torch.autograd.grad, value, list(leaves.values()), allow_unused=True
        )
        # A row may be constant, as where there is nothing to learn from; all of them may not.
        unused = (None,) * len(leaves)
        grads = loss.inside(leaves, before, differentiate) if value.requires_grad else unused
        for name, grad in zip(leaves, grads, strict=True):
            reached = reached or grad is not None
            if grad is None:
                rows[name][m].zero_()
            else:
                rows[name][m] = grad.to_dense() if grad.is_sparse else grad
        losses.append(value.detach())
        aux.append(extra if extra is None else _tree.tree_map(torch.Tensor.detach, extra))
        buffers = {name: b.detach() for name, b in buffers.items()}
    if not reached:
        raise unreached()
    stacked = None if aux[0] is None else _tree.tree_map(lambda *t: torch.stack(t), *aux)
    return rows, torch.stack(losses), buffers, stacked
