"""Plan "fused" for one row: the loss as it is, and one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from gradfilter import _tree
from gradfilter._types import Params
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._batch import Batch
from gradfilter.grads._check_loss import check_reaches
from gradfilter.grads._fused import Forward
from gradfilter.grads._tape import Tape


def forward_single(
    loss: AnyLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    modes: Callable[[], AbstractContextManager[None]],
) -> Forward:
    """Evaluate the loss of a single row, which asks for no vmap.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis of 1.
        batch: The row.
        per_row: Whether they have it.
        modes: Puts the modules into the modes of this pass.
    """
    leaves = {name: loss.leaf(name, p.squeeze(0) if per_row else p) for name, p in params.items()}
    with torch.enable_grad():
        row = batch.rebuild(t.squeeze(0) for t in batch.tensors)
        value, after, aux = loss.pure(leaves, row, batch.buffers)
        check_reaches(value, leaves.values())
        losses = value.unsqueeze(0)

    def inside(backward: Callable[[], None]) -> None:
        with modes():
            loss.inside(leaves, batch.buffers, backward)

    tape = Tape({name: leaf.detach().unsqueeze(0) for name, leaf in leaves.items()}, leaves)
    after = {name: b.detach() for name, b in after.items()}
    aux = None if aux is None else _tree.tree_map(lambda t: t.detach().unsqueeze(0), aux)
    return Forward(losses, tape, after, aux, inside)
