"""Refuse a pass over all rows if attributes of modules make its result differ from that of a loop.

After M passes in order, row m has seen the attributes that row m - 1 left in the modules. In a
pass over all rows no row sees them. That is correct for an activation that is only stored, and
wrong for a counter or a recurrent state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._call_context import CallContext, random_state_restored
from gradfilter.grads._hidden_state import nearly_equal
from gradfilter.grads._module_attributes import Attributes, tensors_in
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._state_owners import CONTAINERS, MISSING, same_value

WEIGHT_REFERENCES = "_flat_weight_refs"
"""Weak references of torch's recurrent modules, which every call compares with the weights."""


def check_remembered(
    loss: NormalizedLoss,
    params: Params,
    batch: Batch,
    context: CallContext,
    used: set[str] | None,
    rows: Sequence[int] = (-1,),
) -> None:
    """Refuse a pass over all rows whose result would differ from that of a loop over rows.

    Args:
        loss: The loss.
        params: The parameters, the same for all rows.
        batch: The rows.
        context: The context before the pass.
        used: The tensors in attributes that the pass used, by name; None if it has changed no
            attribute.
        rows: The rows that run again if there is no other way to decide.

    Raises:
        RuntimeError: A number was drawn on the host, or an attribute changes the loss of rows.
    """
    moved = context.host.moved()
    if moved is not None:
        raise RuntimeError(
            f"the loss draws random numbers from {moved}: one draw for all rows. Draw with torch"
        )
    switched = context.switched()
    if switched is not None:
        raise RuntimeError(
            f"the forward pass switches the training mode of {type(switched).__name__}, which the "
            "next row would see. Switch it outside of the loss, and back inside"
        )
    if used is None:
        return
    unsure: str | None = None
    for name, before, now in context.attributes.changes():
        if name.rpartition(".")[2] == WEIGHT_REFERENCES:
            continue
        if _counts(before, now):
            raise RuntimeError(
                f"the forward pass changes attribute {name!r}, and every row would see the same "
                "value. Count outside of forward, or in a buffer"
            )
        if name in used and not _hold_the_same(before, now):
            raise RuntimeError(
                f"the forward pass reads attribute {name!r} and writes it: a state that cannot be "
                "handed from row to row. Make it a buffer (register_buffer)"
            )
        if name in context.attributes.unwatched or not (_has_tensors(before) and _has_tensors(now)):
            unsure = name
    # A new attribute cannot have been used, but a branch may ask whether it exists. The uses of an
    # attribute of a scripted module are not seen. The first row runs again as well: the attribute
    # may hold what the last row left, which fits the last row.
    if unsure is not None and any(
        _answers_differ(loss, params, batch, context, row) for row in (0, *rows)
    ):
        raise RuntimeError(
            f"the forward pass changes attribute {unsure!r}, and the next row would give another "
            "answer. Make it a buffer (register_buffer), or compute it before"
        )


def _counts(before: Any, now: Any) -> bool:
    if now is MISSING:  # an item is taken from a list
        return True
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_counts(before.get(k), v) for k, v in now.items())
    if type(before) in CONTAINERS or isinstance(before, tuple):
        if not isinstance(now, type(before)) or len(before) != len(now):
            return type(before) in CONTAINERS
        if isinstance(before, set):
            return any(not isinstance(item, Tensor) for item in before ^ now)
        return any(map(_counts, before, now))
    if same_value(before, now):
        return False
    return is_count(before, now)


def is_count(before: Any, now: Any) -> bool:
    """Return whether a value is a number that has changed; also inside a list or a dict."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(is_count(before[key], now[key]) for key in before.keys() & now.keys())
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        return any(map(is_count, before, now))
    number = isinstance(before, (int, float, complex)) and not isinstance(before, bool)
    return number and isinstance(now, (int, float, complex)) and not same_value(before, now)


def _hold_the_same(before: Any, now: Any) -> bool:
    """Return whether only the container is new; recurrent modules rebuild their weight list."""
    return all(
        a is b for a, b in itertools.zip_longest(tensors_in(before), tensors_in(now), fillvalue=now)
    )


def _has_tensors(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def _answers_differ(
    loss: NormalizedLoss, params: Params, batch: Batch, context: CallContext, place: int
) -> bool:
    """Return whether the new attributes change the loss of a row or its gradient.

    The loss of an empty row is NaN, whatever the attributes are, so another row takes its place.
    """
    after, count = context.attributes.present(), batch.count
    step = -1 if place < 0 else 1
    for other in range(count):
        row = batch.rebuild(t[(place + step * other) % count].clone() for t in batch.tensors)
        before, now = (
            _row_with(attributes, loss, params, row, batch.buffers, context)
            for attributes in (context.attributes, after)
        )
        if before is None or now is None:  # a pass that fails differs from one that succeeds
            return True
        if not all(map(nearly_equal, before, now)):
            return True
        if not before[0].isnan():
            return False
    return False


def _row_with(
    attributes: Attributes,
    loss: NormalizedLoss,
    params: Params,
    row: Any,
    buffers: Tree,
    context: CallContext,
) -> list[Tensor] | None:
    """Compute the loss and the gradient of a row with given attributes; None if it fails."""
    present, drawn = context.attributes.present(), context.host.present()
    with random_state_restored(context.device):
        context.rewind()
        attributes.restore()
        try:
            leaves = {name: loss.leaf(name, p) for name, p in params.items()}
            with torch.enable_grad():
                value = loss.pure(leaves, row, buffers)[0]
                found = torch.autograd.grad(
                    value, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            return [value.detach(), *found]
        except Exception:
            return None
        finally:
            present.restore()
            drawn.restore()
