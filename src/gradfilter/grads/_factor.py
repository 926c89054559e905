"""Rows of a leaf that need not be held: what a backward pass leaves of one use of a parameter.

A layer's microbatch gradients are products of what went in and of the gradient of what came out.
A factor holds these two and answers from them what a stack is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _products, _tree

LARGE_SUM = 2.5
"""Ghost products pay while they take up to this many times the flops of the rows themselves.

Rows also cost memory: written, read for the Gram, read again to be combined. Measured for every
layer of ResNet18 at (2, 100), (8, 16) and (16, 8) on two cores; from 1.5 to 2.5 it hardly matters.
"""


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


@dataclass(eq=False)
class OuterFactor(Factor):
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

    def gram(self) -> Tensor:
        """The ghost Gram."""
        return ghost_gram(self.inputs, self.outputs)

    def sq_norms(self) -> Tensor:
        """The ghost Gram's diagonal, block by block, or from the rows where they are fewer."""
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


def ghost_flops(count: int, n: int, p: int, d: int) -> int | None:
    """The flops of the ghost Gram of (M, n, p) and (M, n, d); None where holding rows is cheaper.

    Ghost products take N (p + d), N = M n, where rows and their Gram take p d (n + M).
    """
    products = count * n * (p + d)
    return 2 * count * n * products if products < LARGE_SUM * p * d * (1 + count / n) else None


def ghost_gram(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Σ_tt' ⟨a_mt, a_m't'⟩ ⟨d_mt, d_m't'⟩ for (M, n, d) and (M, n, p). (M, M) float64.

    From 256 positions on the lower half only, in up to four steps; below that, further calls cost
    more than half of the work.
    """
    count, n = inputs.shape[:2]
    step = -(-count // min(max(count * n // 128, 1), 4))
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


def _ghost_block(a: Tensor, d: Tensor, width: int) -> Tensor:
    """The first columns of the ghost Gram."""
    count, n = a.shape[:2]
    with _tree.no_autocast(a):
        products = (a.flatten(0, 1) @ a[:width].flatten(0, 1).T).mul_(
            d.flatten(0, 1) @ d[:width].flatten(0, 1).T
        )
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
