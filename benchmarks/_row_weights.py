"""Rules for the weights of rows, written out for the search of rules."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks._many_digits import Batch, Weigh


def mean(batch: Batch) -> Tensor:
    """Give all rows the same weight: plain training."""
    return torch.full_like(batch.norms, 1 / batch.norms.shape[-1])


def limited(batch: Batch, limit: Tensor | float) -> Tensor:
    """Return min(1, limit/norm)."""
    return (limit / batch.norms).clamp(max=1)


def clip(limit: float) -> Weigh:
    """Limit the norms of all rows."""
    return lambda batch: limited(batch, limit) / batch.norms.shape[-1]


def clip_at_median(multiple: float) -> Weigh:
    """Limit the norms by a multiple of the median norm of the batch."""

    def weigh(batch: Batch) -> Tensor:
        median = batch.norms.median(-1, keepdim=True).values
        return limited(batch, multiple * median) / batch.norms.shape[-1]

    return weigh


def normalised(raw: Tensor) -> Tensor:
    return raw / raw.sum(-1, keepdim=True).clamp(min=1e-12)


def consensus(threshold: float = 1.0, limit: float = torch.inf, *, hard: bool = False) -> Weigh:
    """Apply `gradfilter.consensus_filter` after `gradfilter.clip_per_row`."""

    def weigh(batch: Batch) -> Tensor:
        excess = (batch.cosines - (1 - threshold)).clamp(min=0)
        return normalised((excess > 0).float() if hard else excess) * limited(batch, limit)

    return weigh


def consensus_at_median(multiple: float) -> Weigh:
    """Apply soft consensus to rows limited by a multiple of the median norm."""

    def weigh(batch: Batch) -> Tensor:
        median = batch.norms.median(-1, keepdim=True).values
        return normalised(batch.cosines.clamp(min=0)) * limited(batch, multiple * median)

    return weigh


def saturated(multiple: float, limit: float) -> Weigh:
    """Apply soft consensus with weights limited by a multiple of the median cosine."""

    def weigh(batch: Batch) -> Tensor:
        agreed = batch.cosines.clamp(min=0)
        enough = multiple * agreed.median(-1, keepdim=True).values
        raw = (agreed / enough.clamp(min=1e-6)).clamp(max=1)
        return normalised(raw) * limited(batch, limit)

    return weigh


def never_rejecting(power: float, limit: float) -> Weigh:
    """Use the weights ((1 + s)/2)^power."""

    def weigh(batch: Batch) -> Tensor:
        raw = ((1 + batch.cosines) / 2).clamp(min=0) ** power
        return normalised(raw) * limited(batch, limit)

    return weigh


def within_classes(limit: float = torch.inf) -> Weigh:
    """Apply soft consensus, and compare every row only with rows of the same label."""

    def weigh(batch: Batch) -> Tensor:
        same = (batch.labels[:, :, None] == batch.labels[:, None]).float()
        same = same * (1 - torch.eye(same.shape[-1]))
        unit = batch.unit_gram
        others = torch.einsum("rij,rjk,rik->ri", same, unit, same).clamp(min=1e-6).sqrt()
        agreed = ((same * unit).sum(-1) / others).clamp(min=0)
        return normalised(agreed) * limited(batch, limit)

    return weigh


def geometric_median(batch: Batch) -> Tensor:
    """Make five steps of Weiszfeld's iteration, starting from the mean."""
    gram, sq_norms = batch.gram, batch.norms.square()
    weights = mean(batch)
    for _ in range(5):
        products = torch.einsum("rij,rj->ri", gram, weights)
        square = (weights * products).sum(-1, keepdim=True)
        distance = (sq_norms - 2 * products + square).clamp(min=0).sqrt()
        weights = normalised(1 / (distance + 1e-3))
    return weights


def not_normalised(limit: float, slope: float) -> Weigh:
    """Multiply clipped rows by min(1, slope·s): batches that disagree make smaller steps."""

    def weigh(batch: Batch) -> Tensor:
        agreed = (slope * batch.cosines).clamp(0, 1)
        return agreed * limited(batch, limit) / batch.norms.shape[-1]

    return weigh


def bound_by_agreement(limit: float, slope: float, floor: float) -> Weigh:
    """Clip every row at a limit that grows with its cosine."""

    def weigh(batch: Batch) -> Tensor:
        allowed = limit * (floor + slope * batch.cosines).clamp(min=0)
        return limited(batch, allowed) / batch.norms.shape[-1]

    return weigh


def own_probability(power: float) -> Weigh:
    """Use the weights p(label)^power of the generalised cross entropy."""
    return lambda batch: batch.own**power / batch.norms.shape[-1]


def level(norms: Tensor, shares: Tensor, total: Tensor) -> Tensor:
    """Return c with Σ min(norm, c·share) = total, or infinity if all rows fit into the total."""
    full_at, order = (norms / shares).sort(-1)
    norms, shares = norms.gather(-1, order), shares.gather(-1, order)
    left = total - (norms.cumsum(-1) - norms)
    levels = left / shares.flip(-1).cumsum(-1).flip(-1)
    short = levels <= full_at
    first = levels.gather(-1, short.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.where(short.any(-1, keepdim=True), first, torch.inf)


def budget(size: float, *, fall: float = 1.0, power: float = 0.0, relative: bool = False) -> Weigh:
    """Apply `gradfilter.budget_clip`, or a similar rule.

    Args:
        size: The limit b of the mean norm.
        fall: The exponent in the allowed mean norm b·(b/mean norm)^fall.
        power: The exponent of the cosines in the shares; larger values favour rows that agree.
        relative: Whether b is ``size`` times the mean norm of the first step.
    """

    def weigh(batch: Batch) -> Tensor:
        rows = batch.norms.shape[-1]
        found = batch.norms.mean(-1, keepdim=True)
        b = size * batch.memory.setdefault("first", found) if relative else torch.tensor(size)
        shares = batch.cosines.clamp(min=1e-3) ** power if power else torch.ones_like(batch.norms)
        allowed = b * (b / found).clamp(max=1) ** fall
        return limited(batch, level(batch.norms, shares, allowed * rows) * shares) / rows

    return weigh


def smaller_batch_step(size: float) -> Weigh:
    """Multiply all rows by min(1, b/mean norm)²: a budget with equal factors for all rows."""

    def weigh(batch: Batch) -> Tensor:
        found = batch.norms.mean(-1, keepdim=True)
        return (size / found).clamp(max=1) ** 2 * mean(batch)

    return weigh


def clip_or_not(size: float) -> Weigh:
    """Clip every row at b²/mean norm if the mean norm is above b, otherwise do nothing."""

    def weigh(batch: Batch) -> Tensor:
        found = batch.norms.mean(-1, keepdim=True)
        limit = torch.where(found <= size, torch.inf, size * size / found)
        return limited(batch, limit) / batch.norms.shape[-1]

    return weigh
