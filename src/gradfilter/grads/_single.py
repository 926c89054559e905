"""Plan "fused" for one row: the loss as it is, and one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.utils.hooks import RemovableHandle

from gradfilter import _tree
from gradfilter._types import Params
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._batch import Batch
from gradfilter.grads._fused import Forward
from gradfilter.grads._loop import untouched
from gradfilter.grads._one_image import one_image
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
    loss.hook(leaves)
    hooked: list[str] = []
    handles = RemovableHandle.next_id
    with torch.enable_grad(), one_image(batch, loss.modules), untouched(loss, leaves, hooked):
        # A copy: a first layer that works in place would write into the batch.
        row = batch.rebuild(t.squeeze(0).clone() for t in batch.tensors)
        value, after, aux = loss.settling(leaves, row, batch.buffers)
        losses = value.unsqueeze(0)
    # A hook on a node is seen by nobody, but every hook has a handle, and every handle a number.
    hooked_nodes = RemovableHandle.next_id != handles
    ends = loss.check_reaches(value, leaves.values())
    loss.settle(leaves)
    if not per_row:
        loss.renormalised(params, leaves)
    if ends.reentrant:
        raise RuntimeError(
            "torch.utils.checkpoint(use_reentrant=True) runs in the loop only; use_reentrant=False "
            "runs in every plan"
        )

    def inside(backward: Callable[[], None]) -> None:
        with modes(), one_image(batch, loss.modules):
            loss.inside(leaves, batch.buffers, backward)

    # What a hook makes of the gradient need not be linear in it.
    tape = Tape({name: leaf.detach().unsqueeze(0) for name, leaf in leaves.items()}, leaves)
    seen = hooked or hooked_nodes or loss.hooks or ends.custom or any(_backward_hooks(loss))
    tape.linear = not seen
    after = {name: b.detach() for name, b in after.items()}
    aux = None if aux is None else _tree.tree_map(lambda t: t.detach().unsqueeze(0), aux)
    return Forward(losses, tape, after, aux, inside)


def _backward_hooks(loss: AnyLoss) -> Iterator[bool]:
    """Whether each module has hooks that see its gradients."""
    return (bool(m._backward_hooks or m._backward_pre_hooks) for m in loss.modules.values())
