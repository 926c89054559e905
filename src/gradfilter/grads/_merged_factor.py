"""Factors of groups of rows, put together into one factor of all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._conv_factor import ConvFactor
from gradfilter.grads._dense_factor import DenseFactor
from gradfilter.grads._embedding_factor import EmbeddingFactor
from gradfilter.grads._factor import Factor, OuterFactor
from gradfilter.grads._tiled_factor import TiledFactor


@dataclass(frozen=True)
class Part:
    """What a pass over some rows left of one leaf: a factor for each use.

    Attributes:
        rows: Which rows. (k,) int64.
        factors: One per use.
    """

    rows: Tensor
    factors: list[Factor]


def merged(parts: list[Part], count: int) -> list[Factor]:
    """The factors of a leaf for all rows; a row that is in no part has a gradient of zero."""
    if len({len(part.factors) for part in parts}) == 1:
        rows = [part.rows for part in parts]
        uses = zip(*(part.factors for part in parts), strict=True)
        return [_merged_use(list(use), rows, count) for use in uses]
    # A leaf that some rows use more often than others: there are no uses to pair.
    sums = [
        part.factors[0] if len(part.factors) == 1 else TiledFactor(part.factors) for part in parts
    ]
    return [GroupedFactor(sums, [part.rows for part in parts], count)]


FIELDS: dict[type[Factor], tuple[str, ...]] = {
    ConvFactor: ("inputs", "outputs"),
    DenseFactor: ("held",),
    EmbeddingFactor: ("index", "grads"),
    OuterFactor: ("inputs", "outputs"),
}
"""The tensors (M, ...) of factors that can be put together."""


def _merged_use(factors: list[Factor], rows: list[Tensor], count: int) -> Factor:
    """One factor for all rows, of the same kind where the tensors of the parts fit together."""
    first: Any = factors[0]
    one_kind = len({type(factor) for factor in factors}) == 1
    names = FIELDS.get(type(first), ()) if one_kind else ()
    complete = sum(map(len, rows)) == count
    alike = len({getattr(factor, "geometry", None) for factor in factors}) == 1
    tensors = {name: [getattr(factor, name) for factor in factors] for name in names}
    fit = all(len({(t.dtype, t.shape[1:]) for t in each}) == 1 for each in tensors.values())
    if not (names and complete and alike and fit):
        return GroupedFactor(factors, rows, count)
    joined: Factor = replace(first, **{name: gathered(t, rows) for name, t in tensors.items()})
    return joined


def gathered(tensors: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Tensors (k, ...) of groups of rows as one of all rows, in their order. (M, ...)."""
    found = tensors[0].new_empty(sum(map(len, rows)), *tensors[0].shape[1:])
    for tensor, places in zip(tensors, rows, strict=True):
        found[places] = tensor
    return found


@dataclass(eq=False)
class GroupedFactor(Factor):
    """Factors of groups of rows that are made differently, held as they are.

    Attributes:
        parts: One factor for each group.
        places: The rows of each group. (k,) int64.
        count: M.
    """

    parts: list[Factor]
    places: list[Tensor]
    count: int

    def __post_init__(self) -> None:
        self.shape = self.parts[0].shape
        self.unit = max(part.unit for part in self.parts)

    def _each(self, answer: Callable[[Factor], Tensor]) -> Tensor:
        """The parts' answers (k, ...), in the order of the rows. (M, ...)."""
        answers = [answer(part) for part in self.parts]
        dtype = reduce(torch.promote_types, (found.dtype for found in answers))
        rows = answers[0].new_zeros((self.count, *answers[0].shape[1:]), dtype=dtype)
        for places, found in zip(self.places, answers, strict=True):
            rows[places] = found.to(dtype)
        return rows

    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Of each group."""
        return self._each(lambda part: part.rows(low, high))

    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Of all groups."""

        def own(values: Tensor | None, places: Tensor) -> Tensor | None:
            return None if values is None else values[places]

        totals = [
            part.total(own(weights, places), own(live, places))
            for part, places in zip(self.parts, self.places, strict=True)
        ]
        return reduce(torch.add, totals)

    def dot(self, leaf: Tensor) -> Tensor:
        """Of each group."""
        return self._each(lambda part: part.dot(leaf))

    def sq_norms(self) -> Tensor:
        """Of each group."""
        return self._each(lambda part: part.sq_norms())

    def gram(self) -> Tensor:
        """Each group's own, and between two groups the rows of the smaller one with the other."""
        some = self.places[0]
        gram = torch.zeros(self.count, self.count, dtype=_tree.wide(some), device=some.device)
        groups = list(zip(self.parts, self.places, strict=True))
        for i, (part, places) in enumerate(groups):
            gram[places[:, None], places] = part.gram()
            for other, elsewhere in groups[:i]:
                products = _between(part, other)
                gram[places[:, None], elsewhere] = products
                gram[elsewhere[:, None], places] = products.T
        return gram


def _between(a: Factor, b: Factor) -> Tensor:
    """The products of every row of one factor with every row of another."""
    if a.count > b.count:
        return _between(b, a).T
    return torch.stack([b.dot(row) for row in a.rows()])
