"""The matrix A in front of the Jacobian as two linear maps, with no C x C numbers held."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._cotangents import Normalization, cotangents

Map = Callable[[Tensor], Tensor]


def factor_maps(logits: Tensor, normalization: Normalization, rows: Tensor) -> tuple[Map, Map]:
    """A v for v (N, C), and Aᵀ u for u (N, C'), of every sample and wide.

    With p = softmax f:

        none, jacobian    A = I
        softmax           A u = Aᵀ u = p ∘ (u − ⟨p, u⟩ 1)
        logsoftmax        A v = v − ⟨p, v⟩ 1,    Aᵀ u = u − ⟨1, u⟩ p

    Of a confident sample these are differences of what is nearly equal. As A 1 = 0, the top class
    can be given v_t = 0 first, and then nothing large is in ⟨p, v⟩; and as ⟨1, Aᵀ u⟩ = 0, its
    entry of Aᵀ u is had from the others.

    Args:
        logits: f, (N, C).
        normalization: What A normalises.
        rows: Classes (C', N): all of them, or one per sample, whose row of A is then held.
    """
    if len(rows) == 1:
        row = cotangents(logits, normalization, rows)[0].to(_tree.wide(logits))
        return lambda v: (row * v).sum(1, keepdim=True), lambda u: row * u
    if normalization in ("none", "jacobian"):
        return _same, _same
    p = logits.to(_tree.wide(logits)).softmax(1)
    top = p.argmax(1, keepdim=True)

    def centred(v: Tensor) -> Tensor:
        v = v - v.gather(1, top)
        return v - (p * v).sum(1, keepdim=True)

    def weighted(u: Tensor) -> Tensor:
        return p * centred(u)

    def balanced(u: Tensor) -> Tensor:
        others = (u - p * u.sum(1, keepdim=True)).scatter(1, top, 0.0)
        return others.scatter(1, top, -others.sum(1, keepdim=True))

    return (weighted, weighted) if normalization == "softmax" else (centred, balanced)


def _same(v: Tensor) -> Tensor:
    return v
