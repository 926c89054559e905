"""Override of the cross-entropy against class indices: one kernel over all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter._readable import readable
from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused._tape import Tape


def class_loss(function: Callable[..., Tensor]) -> Override:
    """Return the override of `torch.nn.functional.cross_entropy` or `nll_loss`."""

    def replacement(
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
        losses = _ClassLoss(function, weight, ignore_index, reduction, smoothing)
        rows, targets = host.level.lower(input), host.level.lower(target)
        return host.run(function.__name__, losses.of_rows, host.tape, rows, targets)

    return replacement


@dataclass(frozen=True, eq=False)
class _ClassLoss:
    """A loss against class labels with its options, named as torch names them."""

    function: Callable[..., Tensor]
    weight: Tensor | None
    ignore_index: int
    reduction: str
    smoothing: dict[str, float]

    def of_rows(self, tape: Tape, rows: Tensor, targets: Tensor) -> Tensor:
        """Compute the losses of all rows by one kernel."""
        shape = targets.shape
        if rows.ndim == 2:  # a row of one sample, without a sample axis
            rows, targets = rows.unsqueeze(1), targets.unsqueeze(1)
        self._note_ignored(tape, targets)
        each = self.function(
            rows.flatten(0, 1),
            targets.flatten(0, 1),
            weight=self.weight,
            ignore_index=self.ignore_index,
            **self.smoothing,
            reduction="none",
        )
        found = self._reduced(each.view(targets.shape), targets)
        return found.view(shape) if self.reduction == "none" else found

    def _note_ignored(self, tape: Tape, targets: Tensor) -> None:
        """Record the rows that have only ignored labels, if no rank may ask for norms alone."""
        if tape.sharded.leaves or not readable(targets):
            nothing = (targets == self.ignore_index).flatten(1).all(1)
            tape.ignored = nothing if tape.ignored is None else tape.ignored & nothing

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Reduce the losses of every row as torch does; a mean is over the labels not ignored."""
        if self.reduction == "none":
            return losses
        # torch's own kernels sum in this dtype.
        wide = torch.promote_types(losses.dtype, torch.float32)
        total = losses.flatten(1).sum(1, dtype=wide)
        if self.reduction == "mean":
            counts, weight = targets != self.ignore_index, self.weight
            if weight is not None:
                counts = torch.where(counts, weight[torch.where(counts, targets, 0).long()], 0.0)
            total = total / counts.flatten(1).sum(1, dtype=wide)
        return total.to(losses.dtype)
