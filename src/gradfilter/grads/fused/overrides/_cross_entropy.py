"""Override of the cross-entropy against class indices: one kernel over all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter._readable import readable
from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused._tape import Tape


def class_loss(function: Callable[..., Tensor]) -> Override:
    """Return the override of `torch.nn.functional.cross_entropy` or `nll_loss`."""

    def override(
        host: Host,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        **smoothing: float,
    ) -> Any:
        usual = size_average is None and reduce is None and reduction in ("mean", "sum", "none")
        if not usual or not host.level.batched(input) or host.level.batched(weight):
            return NotImplemented
        if target.is_floating_point() or target.ndim != max(input.ndim - 1, 0):
            return NotImplemented
        options = {"weight": weight, "ignore_index": ignore_index, **smoothing}
        rows, targets = host.level.lower(input), host.level.lower(target)

        def losses(rows: Tensor, targets: Tensor) -> Tensor:
            if input.ndim == 1:  # a row of one sample, without a sample axis
                rows, targets = rows.unsqueeze(1), targets.unsqueeze(1)
            _note_ignored(host.tape, targets, ignore_index)
            each = function(rows.flatten(0, 1), targets.flatten(0, 1), **options, reduction="none")
            found = _reduced(each.view(targets.shape), targets, weight, ignore_index, reduction)
            return found.view(len(found), *target.shape) if reduction == "none" else found

        return host.run(function.__name__, losses, rows, targets)

    return override


def _note_ignored(tape: Tape, targets: Tensor, ignored: int) -> None:
    """Record the rows that have only ignored labels, if the losses cannot be read."""
    if not readable(targets):
        nothing = (targets == ignored).flatten(1).all(1)
        tape.ignored = nothing if tape.ignored is None else tape.ignored & nothing


def _reduced(
    losses: Tensor, targets: Tensor, weight: Tensor | None, ignored: int, reduction: str
) -> Tensor:
    """Reduce the losses of every row as torch does; a mean is over the labels not ignored."""
    if reduction == "none":
        return losses
    wide = torch.promote_types(losses.dtype, torch.float32)  # torch's own kernels sum in this dtype
    total = losses.flatten(1).sum(1, dtype=wide)
    if reduction == "mean":
        counts = targets != ignored
        if weight is not None:
            counts = torch.where(counts, weight[torch.where(counts, targets, 0).long()], 0.0)
        total = total / counts.flatten(1).sum(1, dtype=wide)
    return total.to(losses.dtype)
