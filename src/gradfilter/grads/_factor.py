"""Rows of a leaf that need not be held: what a backward pass leaves of one use of a parameter.

A layer's microbatch gradients are products of what went in and of the gradient of what came out.
A factor holds these two and answers from them what a stack is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from gradfilter import _products, _tree

LARGE_SUM = 2.5
"""Ghost products pay while they take up to this many times the flops of the rows themselves.

Rows also cost memory: written, read for the Gram, read again to be combined. Measured for every
layer of ResNet18 at (2, 100), (8, 16) and (16, 8) on two cores; from 1.5 to 2.5 it hardly matters.
"""


TILE = 2**24
"""Bytes of rows that are held at a time."""

LARGEST = 2**26
"""Bytes of products, windows or rows that an answer may take for a moment."""


F = TypeVar("F", bound="Divisible")


class Factor(ABC):
    """The M gradients of one leaf from one of its uses, in some cheaper form.

    Attributes:
        shape: The shape of the leaf.
        count: M.
        unit: `rows` may be asked for multiples of so many units.
    """

    shape: torch.Size
    count: int
    unit: int = 1

    @abstractmethod
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """The rows on the leaf's units (its dim 0) from low to high. (M, high - low, ...)."""

    @abstractmethod
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Σ_m w_m row_m, w = 1 when not given; nothing of a row that is not live. The leaf's shape.

        Args:
            weights: (M,).
            live: (M,) bool; None says that no row has to be kept out.
        """

    @abstractmethod
    def dot(self, leaf: Tensor) -> Tensor:
        """The product of every row with a leaf. (M,) float64."""

    @abstractmethod
    def gram(self) -> Tensor:
        """The Gram of these rows, of this one use of the leaf alone. (M, M) float64."""

    @abstractmethod
    def sq_norms(self) -> Tensor:
        """The diagonal of `gram`. (M,)."""


class Divisible(Factor):
    """A factor whose rows can be taken apart."""

    @abstractmethod
    def part(self, low: int, high: int) -> Self:
        """The same for some of the M rows."""


def tiles(factor: Factor) -> Iterator[Tensor]:
    """The rows (M, ...) of a factor, some of the leaf's units at a time."""
    if not factor.shape:
        yield factor.rows().reshape(factor.count, 1)
        return
    per_unit = factor.count * factor.shape[1:].numel() * 4
    step = max(factor.unit, TILE // max(per_unit, 1) // factor.unit * factor.unit)
    for low in range(0, factor.shape[0], step):
        rows = factor.rows(low, min(low + step, factor.shape[0]))
        yield rows.reshape(factor.count, -1)


def tiled_gram(factor: Factor) -> Tensor:
    """The Gram, tile by tile. (M, M) float64."""
    total: Tensor | None = None
    for tile in tiles(factor):
        products = _products.inner(tile, tile)
        total = products if total is None else total.add_(products)
    assert total is not None
    return total


def tiled_sq_norms(factor: Factor) -> Tensor:
    """Its diagonal, tile by tile. (M,)."""
    return torch.stack([_products.row_sq_norms(tile) for tile in tiles(factor)]).sum(0)


@dataclass(eq=False)
class OuterFactor(Divisible):
    """row_m = Σ_t d_mt ⊗ a_mt: inputs a (M, n, d) and output gradients d (M, n, p) of a product.

    Its Gram needs no rows: ⟨d ⊗ a, d' ⊗ a'⟩ = ⟨d, d'⟩ ⟨a, a'⟩, so K is (D Dᵀ) ∘ (A Aᵀ), summed
    over the positions t of either row.
    """

    inputs: Tensor
    outputs: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        self.count = len(self.inputs)

    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """D_mᵀ A_m, one batched product."""
        columns = self.outputs[..., low:high].mT
        # Of one position each it is an outer product, bound by memory alone.
        single = self.inputs.shape[1] == 1
        rows = columns * self.inputs if single else torch.bmm(columns, self.inputs)
        return rows.view(self.count, -1, *self.shape[1:])

    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Dᵀ A over all rows, output gradients weighted."""
        outputs, inputs = weigh(self.outputs, weights, live), mask(self.inputs, live)
        return (outputs.flatten(0, 1).T @ inputs.flatten(0, 1)).view(self.shape)

    def dot(self, leaf: Tensor) -> Tensor:
        """Σ_t ⟨d_mt, V a_mt⟩, a product like the forward one."""
        moved = self.inputs @ leaf.reshape(len(leaf), -1).T.to(self.inputs.dtype)
        return paired(moved, self.outputs)

    def part(self, low: int, high: int) -> Self:
        """The same for some of the M rows."""
        return replace(self, inputs=self.inputs[low:high], outputs=self.outputs[low:high])

    def gram(self) -> Tensor:
        """The ghost Gram, or from the rows where that takes less."""
        (n, p), d = self.outputs.shape[1:], self.inputs.shape[2]
        if not n or ghost_flops(self.count, n, p, d) is None:
            return tiled_gram(self)
        return ghost_gram(self.inputs, self.outputs)

    def sq_norms(self) -> Tensor:
        """The ghost Gram's diagonal, block by block, or from the rows where they are fewer."""
        (n, p), d = self.outputs.shape[1:], self.inputs.shape[2]
        return by_rows(self, 4 * min(2 * n * n, p * d), OuterFactor._sq_norms)

    def _sq_norms(self) -> Tensor:
        (n, p), d = self.outputs.shape[1:], self.inputs.shape[2]
        if n == 1:
            return _products.row_sq_norms(self.inputs[:, 0]) * _products.row_sq_norms(
                self.outputs[:, 0]
            )
        if 2 * n * n <= p * d:
            inputs, outputs = map(_tree.at_least_float32, (self.inputs, self.outputs))
            products = torch.bmm(inputs, inputs.mT).mul_(torch.bmm(outputs, outputs.mT))
            return products.sum((1, 2), dtype=_tree.wide(products)).clamp(min=0)
        return _products.row_sq_norms(self.rows().flatten(1))


def by_rows(factor: F, bytes_of_row: int, answer: Callable[[F], Tensor]) -> Tensor:
    """An answer (M, ...) that takes so many bytes for each of the M rows, for some at a time."""
    step = max(1, LARGEST // max(bytes_of_row, 1))
    if step >= factor.count:
        return answer(factor)
    parts = (factor.part(low, low + step) for low in range(0, factor.count, step))
    return torch.cat([answer(part) for part in parts])


def ghost_flops(count: int, n: int, p: int, d: int) -> int | None:
    """The flops of the ghost Gram of (M, n, p) and (M, n, d); None where holding rows is cheaper.

    Ghost products take N (p + d), N = M n, where rows and their Gram take p d (n + M).
    """
    products = count * n * (p + d)
    return 2 * count * n * products if products < LARGE_SUM * p * d * (1 + count / n) else None


def ghost_gram(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Σ_tt' ⟨a_mt, a_m't'⟩ ⟨d_mt, d_m't'⟩ for (M, n, d) and (M, n, p). (M, M) float64.

    From 256 positions on the lower half only, in four steps, or as many as keep products small;
    below that, further calls cost more than half of the work.
    """
    count, n = inputs.shape[:2]
    step = -(-count // min(max(count * n // 128, 1), 4))
    step = min(step, max(1, LARGEST // (4 * count * n * n)))
    a, d = _tree.at_least_float32(inputs), _tree.at_least_float32(outputs)
    if step == count:
        return _ghost_block(a, d, count)
    gram = torch.empty(count, count, dtype=_tree.wide(a), device=a.device)
    for low in range(0, count, step):
        high = min(low + step, count)
        block = _ghost_block(a[low:], d[low:], high - low)
        gram[low:, low:high] = block
        gram[low:high, high:] = block[high - low :].T
    return gram


def ghost_between(own: OuterFactor, other: OuterFactor) -> Tensor:
    """The products of the rows of two factors, from inputs and output gradients. (k, l) float64."""
    tensors = (own.inputs, own.outputs, other.inputs, other.outputs)
    return _ghost_products(*map(_tree.at_least_float32, tensors))


def _ghost_block(a: Tensor, d: Tensor, width: int) -> Tensor:
    """The first columns of the ghost Gram."""
    return _ghost_products(a, d, a[:width], d[:width])


def _ghost_products(a: Tensor, d: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Σ_tt' ⟨a_mt, b_m't'⟩ ⟨d_mt, e_m't'⟩. (k, l) float64."""
    (count, n), width = a.shape[:2], len(b)
    with _tree.no_autocast(a):
        products = (a.flatten(0, 1) @ b.flatten(0, 1).T).mul_(d.flatten(0, 1) @ e.flatten(0, 1).T)
    if n == 1:
        return products.to(_tree.wide(a))
    sums = products.view(-1, width, n).sum(2, dtype=_tree.wide(a))
    return sums.view(count, n, width).sum(1)


def weigh(tensor: Tensor, weights: Tensor | None, live: Tensor | None) -> Tensor:
    """Every row of (M, ...) times its weight, exactly 0 where it is not live."""
    if weights is not None:
        wide = _tree.at_least_float32(tensor)
        tensor = (wide * _along_rows(weights.to(wide.dtype), wide)).to(tensor.dtype)
    return mask(tensor, live)


def mask(tensor: Tensor, live: Tensor | None) -> Tensor:
    """Rows of (M, ...) that are not live replaced by 0."""
    return tensor if live is None else torch.where(_along_rows(live, tensor), tensor, 0.0)


def paired(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of every row of (M, ...) with the same row of another. (M,) float64."""
    product = _tree.at_least_float32(a) * _tree.at_least_float32(b)
    return product.flatten(1).sum(1, dtype=_tree.wide(product))


def _along_rows(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(-1, *[1] * (tensor.ndim - 1))
