"""Whether all rows may run at once, although the modules remember something of a pass.

After M passes in order row m has met what row m - 1 left in the modules' attributes. In a pass over
all rows at once nobody met anything: right for an activation that is only remembered, wrong for a
counter or for a recurrent state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import Params
from gradfilter.grads._ambient import Ambient, random_state_restored
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._attributes import CONTAINERS, same_value, tensors_in
from gradfilter.grads._batch import Batch


def check_remembered(
    loss: AnyLoss,
    params: Params,
    batch: Batch,
    ambient: Ambient,
    used: set[str] | None,
    rows: Sequence[int] = (-1,),
) -> None:
    """Refuse a pass over all rows that a pass row by row would not have equalled.

    Args:
        loss: The loss.
        params: The parameters, the same for all rows.
        batch: The rows.
        ambient: The moment before the pass.
        used: The tensors in attributes that the pass computed with, by name; None where it has
            changed no attribute.
        rows: Those that are asked again where nothing else tells.

    Raises:
        RuntimeError: A number on the host was drawn, or an attribute changes what rows answer.
    """
    moved = ambient.host.moved()
    if moved is not None:
        raise RuntimeError(
            f"the loss draws random numbers from {moved}: one draw for all rows. Draw with torch"
        )
    if used is None:
        return
    unsure: str | None = None
    for name, before, now in ambient.attributes.changes():
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
        if not (_has_tensors(before) and _has_tensors(now)):
            unsure = name
    # What was not there before cannot have been used, but a branch may ask whether it is there.
    if unsure is not None and any(
        _answers_differ(loss, params, batch, ambient, row) for row in rows
    ):
        raise RuntimeError(
            f"the forward pass changes attribute {unsure!r}, and the next row would give another "
            "answer. Make it a buffer (register_buffer), or compute it before"
        )


def _counts(before: Any, now: Any) -> bool:
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
    number = isinstance(before, (int, float, complex)) and not isinstance(before, bool)
    return number and isinstance(now, (int, float, complex))


def _hold_the_same(before: Any, now: Any) -> bool:
    """Whether only the container is new: recurrent modules list their weights again."""
    return all(
        a is b for a, b in itertools.zip_longest(tensors_in(before), tensors_in(now), fillvalue=now)
    )


def _has_tensors(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def _answers_differ(
    loss: AnyLoss, params: Params, batch: Batch, ambient: Ambient, place: int
) -> bool:
    """Whether a row has another loss with the attributes as they are than as they were."""
    after = ambient.attributes.present()
    row = batch.rebuild(t[place].clone() for t in batch.tensors)

    def value() -> Tensor:
        leaves = {name: loss.leaf(name, p) for name, p in params.items()}
        with torch.enable_grad():
            return loss.pure(leaves, row, batch.buffers)[0].detach()

    return not _equal(*(_at(ambient, moment, value) for moment in (ambient.attributes, after)))


def _at(ambient: Ambient, moment: Any, value: Callable[[], Tensor]) -> Tensor | None:
    present, drawn = ambient.attributes.present(), ambient.host.present()
    with random_state_restored(ambient.device):
        ambient.rewind()
        moment.restore()
        try:
            return value()
        except Exception:
            return None  # a pass that fails differs from one that does not
        finally:
            present.restore()
            drawn.restore()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
