"""Rules that weigh the rows of a batch, written out for the search: what was tried, by family."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks._many_digits import Batch, Weigh


def mean(batch: Batch) -> Tensor:
    """Plain training."""
    return torch.full_like(batch.norms, 1 / batch.norms.shape[-1])


def limited(batch: Batch, limit: Tensor | float) -> Tensor:
    """min(1, limit/norm)."""
    return (limit / batch.norms).clamp(max=1)


def clip(limit: float) -> Weigh:
    """The norms of all rows bounded."""
    return lambda batch: limited(batch, limit) / batch.norms.shape[-1]


def clip_at_median(multiple: float) -> Weigh:
    """Bounded by a multiple of the batch's median norm."""

    def weigh(batch: Batch) -> Tensor:
        median = batch.norms.median(-1, keepdim=True).values
        return limited(batch, multiple * median) / batch.norms.shape[-1]

    return weigh


def normalised(raw: Tensor) -> Tensor:
    return raw / raw.sum(-1, keepdim=True).clamp(min=1e-12)


def consensus(threshold: float = 1.0, limit: float = torch.inf, *, hard: bool = False) -> Weigh:
    """`gradfilter.consensus_filter` after `gradfilter.clip_per_row`."""

    def weigh(batch: Batch) -> Tensor:
        excess = (batch.cosines - (1 - threshold)).clamp(min=0)
        return normalised((excess > 0).float() if hard else excess) * limited(batch, limit)

    return weigh


def consensus_at_median(multiple: float) -> Weigh:
    """Soft consensus, rows bounded by a multiple of the batch's median norm."""

    def weigh(batch: Batch) -> Tensor:
        median = batch.norms.median(-1, keepdim=True).values
        return normalised(batch.cosines.clamp(min=0)) * limited(batch, multiple * median)

    return weigh


def saturated(multiple: float, limit: float) -> Weigh:
    """Soft consensus that no longer grows from a multiple of the median cosine on."""

    def weigh(batch: Batch) -> Tensor:
        agreed = batch.cosines.clamp(min=0)
        enough = multiple * agreed.median(-1, keepdim=True).values
        raw = (agreed / enough.clamp(min=1e-6)).clamp(max=1)
        return normalised(raw) * limited(batch, limit)

    return weigh


def never_rejecting(power: float, limit: float) -> Weigh:
    """Weights ((1 + s)/2)^power."""

    def weigh(batch: Batch) -> Tensor:
        raw = ((1 + batch.cosines) / 2).clamp(min=0) ** power
        return normalised(raw) * limited(batch, limit)

    return weigh


def within_classes(limit: float = torch.inf) -> Weigh:
    """Soft consensus, every row compared with those of its own label only."""

    def weigh(batch: Batch) -> Tensor:
        same = (batch.labels[:, :, None] == batch.labels[:, None]).float()
        same = same * (1 - torch.eye(same.shape[-1]))
        unit = batch.unit_gram
        others = torch.einsum("rij,rjk,rik->ri", same, unit, same).clamp(min=1e-6).sqrt()
        agreed = ((same * unit).sum(-1) / others).clamp(min=0)
        return normalised(agreed) * limited(batch, limit)

    return weigh


def geometric_median(batch: Batch) -> Tensor:
    """Five steps of Weiszfeld's iteration from the mean."""
    gram, sq_norms = batch.gram, batch.norms.square()
    weights = mean(batch)
    for _ in range(5):
        products = torch.einsum("rij,rj->ri", gram, weights)
        square = (weights * products).sum(-1, keepdim=True)
        distance = (sq_norms - 2 * products + square).clamp(min=0).sqrt()
        weights = normalised(1 / (distance + 1e-3))
    return weights


def not_normalised(limit: float, slope: float) -> Weigh:
    """Every clipped row times min(1, slope·s): a batch that disagrees takes a smaller step."""

    def weigh(batch: Batch) -> Tensor:
        agreed = (slope * batch.cosines).clamp(0, 1)
        return agreed * limited(batch, limit) / batch.norms.shape[-1]

    return weigh


def bound_by_agreement(limit: float, slope: float, floor: float) -> Weigh:
    """Clipping at a limit that grows with a row's cosine."""

    def weigh(batch: Batch) -> Tensor:
        allowed = limit * (floor + slope * batch.cosines).clamp(min=0)
        return limited(batch, allowed) / batch.norms.shape[-1]

    return weigh


def own_probability(power: float) -> Weigh:
    """The gradient of the generalised cross entropy: weights p(label)^power."""
    return lambda batch: batch.own**power / batch.norms.shape[-1]


def level(norms: Tensor, shares: Tensor, total: Tensor) -> Tensor:
    """The c with Σ min(norm, c·share) = total; infinite where even all of it is not too much."""
    full_at, order = (norms / shares).sort(-1)
    norms, shares = norms.gather(-1, order), shares.gather(-1, order)
    left = total - (norms.cumsum(-1) - norms)
    levels = left / shares.flip(-1).cumsum(-1).flip(-1)
    short = levels <= full_at
    first = levels.gather(-1, short.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.where(short.any(-1, keepdim=True), first, torch.inf)


def budget(size: float, *, fall: float = 1.0, power: float = 0.0, relative: bool = False) -> Weigh:
    """`gradfilter.budget_clip`, and its relatives.

    Args:
        size: b, of the mean norm.
        fall: What is allowed is b·(b/mean norm)^fall.
        power: How much of it goes to rows that agree.
        relative: b is ``size`` times the mean norm of the first step.
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
    """All rows times min(1, b/mean norm)²: the budget without choosing among rows."""

    def weigh(batch: Batch) -> Tensor:
        found = batch.norms.mean(-1, keepdim=True)
        return (size / found).clamp(max=1) ** 2 * mean(batch)

    return weigh


def clip_or_not(size: float) -> Weigh:
    """Nothing while the mean norm is under b, else every row clipped at b²/mean norm."""

    def weigh(batch: Batch) -> Tensor:
        found = batch.norms.mean(-1, keepdim=True)
        limit = torch.where(found <= size, torch.inf, size * size / found)
        return limited(batch, limit) / batch.norms.shape[-1]

    return weigh
