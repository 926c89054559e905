"""Plan "fused" for one row: the loss as it is, and one ordinary backward pass."""

from __future__ import annotations

import torch

from gradfilter import _tree
from gradfilter._types import Params
from gradfilter.grads._batch import Batch
from gradfilter.grads._check_loss import check_differentiable
from gradfilter.grads._fused import Forward
from gradfilter.grads._loop import PureLoss
from gradfilter.grads._tape import Tape


def forward_single(loss: PureLoss, params: Params, batch: Batch, per_row: bool) -> Forward:
    """Evaluate the loss of a single row, which asks for no vmap; arguments as in `loop_rows`."""
    leaves = {
        name: (p if per_row else p.unsqueeze(0)).detach().requires_grad_()
        for name, p in params.items()
    }
    with torch.enable_grad():
        row = batch.rebuild(t.squeeze(0) for t in batch.tensors)
        inside = {name: leaf.squeeze(0) for name, leaf in leaves.items()}
        value, after, aux = loss(inside, row, batch.buffers)
        check_differentiable(value)
        losses = value.unsqueeze(0)
    after = {name: b.detach() for name, b in after.items()}
    aux = None if aux is None else _tree.tree_map(lambda t: t.detach().unsqueeze(0), aux)
    return Forward(losses, Tape(leaves), after, aux)
