"""Overrides of losses for which vmap has no rule: one kernel over the samples of all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused.overrides._row_by_row import row_by_row

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class _Loss:
    """The override of a loss.

    Attributes:
        function: torch's loss.
        names: The names of its tensors.
        run: Takes the loss without a reduction, and its tensors of all rows (M, ...). Returns a
            loss (M, ...) of every entry or sample; None if their dims are not the usual ones.
        reductions: The values of ``reduction`` that it knows.
    """

    function: Callable[..., Tensor]
    names: tuple[str, ...]
    run: Callable[..., Tensor | None]
    reductions: tuple[str, ...] = REDUCTIONS

    def __call__(self, host: Host, /, *args: Any, **kwargs: Any) -> Any:
        tensors, options = _split(self.names, args, kwargs)
        reduction = options.pop("reduction", "mean")
        legacy = options.pop("size_average", None), options.pop("reduce", None)
        if tensors is None or legacy != (None, None) or reduction not in self.reductions:
            return row_by_row(self.function)(host, *args, **kwargs)
        if not host.batched(*tensors):
            return NotImplemented
        every = partial(self.function, **options, reduction="none")
        rows = [host.level.lower(t) for t in tensors]
        with host.level.on_all_rows():
            found = self.run(every, *rows)
            if found is not None:
                found = _reduced(found, reduction, tensors[0].shape)
        if found is None:
            return row_by_row(self.function)(host, *args, **kwargs)
        host.tape.overrides[self.function.__name__] += 1
        return host.level.wrap(found)


def _split(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor] | None, dict[str, Any]]:
    """Return the tensors and the options; None if options are given by position."""
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors = [given.pop(name, None) for name in names]
    usual = len(args) <= len(names) and all(isinstance(t, Tensor) for t in tensors)
    shared = not any(isinstance(value, Tensor) for value in given.values())
    return (tensors if usual and shared else None), given


def _reduced(losses: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return losses
    rows = losses.flatten(1) if losses.ndim > 1 else losses[:, None]
    if reduction == "mean":
        return rows.mean(1)
    total = rows.sum(1)
    return total / shape[0] if reduction == "batchmean" else total


def _of_entries(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Compute the loss of every entry, of tensors that are broadcast within a row."""
    most = max(t.ndim for t in rows)
    return loss(*(t.reshape(t.shape[0], *[1] * (most - t.ndim), *t.shape[1:]) for t in rows))


def _of_samples(loss: Callable[..., Tensor], rows: Tensor, targets: Tensor) -> Tensor | None:
    """Compute the loss of every sample, whose scores are the last dim of (M, N, C)."""
    if rows.ndim != 3 or targets.shape[:2] != rows.shape[:2]:
        return None
    return loss(rows.flatten(0, 1), targets.flatten(0, 1)).view(rows.shape[:2])


def _of_vectors(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor | None:
    """Compute the loss of vectors of one shape, which are the last dim."""
    alike = all(t.shape == rows[0].shape for t in rows)
    return loss(*rows) if alike and rows[0].ndim > 1 else None


def ctc_loss(
    host: Host,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Any:
    """Replace `torch.nn.functional.ctc_loss` of targets (N, S)."""
    if not host.batched(log_probs):
        return NotImplemented
    if log_probs.ndim != 3 or targets.ndim != 2 or reduction not in REDUCTIONS:
        given = (log_probs, targets, input_lengths, target_lengths)
        return row_by_row(F.ctc_loss)(host, *given, blank, reduction, zero_infinity)
    rows, labels = host.level.lower(log_probs), host.level.lower(targets)
    steps, lengths = (_lengths(host, given) for given in (input_lengths, target_lengths))
    with host.level.on_all_rows():
        every = rows.movedim(0, 1).flatten(1, 2)  # (T, M N, C)
        options: dict[str, Any] = {"blank": blank, "zero_infinity": zero_infinity}
        losses = F.ctc_loss(
            every, labels.flatten(0, 1), steps, lengths, reduction="none", **options
        )
        losses = losses.view(labels.shape[:2])
        if reduction == "mean":  # as torch: per label, then over samples
            counts = torch.as_tensor(lengths, device=losses.device).view(losses.shape)
            losses = losses / counts.clamp(min=1).to(losses.dtype)
        found = _reduced(losses, reduction, torch.Size())
    host.tape.overrides["ctc_loss"] += 1
    return host.level.wrap(found)


def _lengths(host: Host, given: Any) -> Any:
    """Return the lengths of the samples of all rows."""
    if isinstance(given, Tensor):
        rows = host.level.lower(given)
        with host.level.on_all_rows():
            return rows.flatten()
    return tuple(given) * host.level.rows


def gaussian_nll_loss(
    host: Host,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Any:
    """Replace `torch.nn.functional.gaussian_nll_loss`, which asks whether a variance is < 0."""
    tensors = (input, target, *([var] if isinstance(var, Tensor) else []))
    if not host.batched(*tensors) or reduction not in REDUCTIONS:
        return NotImplemented
    rows = [host.level.lower(t) for t in tensors]
    if len({t.ndim for t in rows[:2]}) > 1:
        return row_by_row(F.gaussian_nll_loss)(host, input, target, var, full, eps, reduction)
    with host.level.on_all_rows():
        given = rows[2] if isinstance(var, Tensor) else var
        options: dict[str, Any] = {"full": full, "eps": eps, "reduction": "none"}
        losses = F.gaussian_nll_loss(rows[0], rows[1], given, **options)
        found = _reduced(losses, reduction, input.shape)
    host.tape.overrides["gaussian_nll_loss"] += 1
    return host.level.wrap(found)


LOSSES: dict[Callable[..., Any], Override] = {
    F.kl_div: _Loss(F.kl_div, ("input", "target"), _of_entries, (*REDUCTIONS, "batchmean")),
    F.soft_margin_loss: _Loss(F.soft_margin_loss, ("input", "target"), _of_entries),
    F.margin_ranking_loss: _Loss(
        F.margin_ranking_loss, ("input1", "input2", "target"), _of_entries
    ),
    F.multi_margin_loss: _Loss(F.multi_margin_loss, ("input", "target"), _of_samples),
    F.multilabel_margin_loss: _Loss(F.multilabel_margin_loss, ("input", "target"), _of_samples),
    F.triplet_margin_loss: _Loss(
        F.triplet_margin_loss, ("anchor", "positive", "negative"), _of_vectors
    ),
    F.ctc_loss: ctc_loss,
    F.gaussian_nll_loss: gaussian_nll_loss,
}
"""The override of every loss. Losses that vmap has rules for are as fast without an override."""
