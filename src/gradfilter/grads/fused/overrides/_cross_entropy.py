"""Override of the cross-entropy against class indices: one kernel over all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter._readable import readable
from gradfilter.grads.fused._host import Host, Rule
from gradfilter.grads.fused._tape import Tape


def class_loss(function: Callable[..., Tensor]) -> Rule:
    """The rule of `torch.nn.functional.cross_entropy` or `torch.nn.functional.nll_loss`."""

    def rule(
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
            if input.ndim == 1:  # a row of one sample, without an axis for it
                rows, targets = rows.unsqueeze(1), targets.unsqueeze(1)
            _note_ignored(host.tape, targets, ignore_index)
            each = function(rows.flatten(0, 1), targets.flatten(0, 1), **options, reduction="none")
            found = _reduced(each.view(targets.shape), targets, weight, ignore_index, reduction)
            return found.view(len(found), *target.shape) if reduction == "none" else found

        return host.run(function.__name__, losses, rows, targets)

    return rule


def _note_ignored(tape: Tape, targets: Tensor, ignored: int) -> None:
    """Note which rows have nothing but ignored labels, where losses cannot be looked at."""
    if not readable(targets):
        nothing = (targets == ignored).flatten(1).all(1)
        tape.ignored = nothing if tape.ignored is None else tape.ignored & nothing


def _reduced(
    losses: Tensor, targets: Tensor, weight: Tensor | None, ignored: int, reduction: str
) -> Tensor:
    """The losses of every row put together as torch does: a mean is over what is not left out."""
    if reduction == "none":
        return losses
    wide = torch.promote_types(losses.dtype, torch.float32)  # as torch's own kernels add up
    total = losses.flatten(1).sum(1, dtype=wide)
    if reduction == "mean":
        counts = targets != ignored
        if weight is not None:
            counts = torch.where(counts, weight[torch.where(counts, targets, 0).long()], 0.0)
        total = total / counts.flatten(1).sum(1, dtype=wide)
    return total.to(losses.dtype)
