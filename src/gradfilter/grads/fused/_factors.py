"""Represent the rows of a leaf by the factors whose products they are.

The microbatch gradients of a layer are products of its inputs and of its output gradients. A factor
holds these two and computes from them the answers of a stack, without the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _products, _tree
from gradfilter._types import Tree

# --- The interface of a factor, and the factor of a linear layer ---


LARGE_SUM = 2.5
"""The ghost Gram is used while it takes at most this many times the flops of the rows themselves.

Rows also cost memory traffic: they are written, read for the Gram, and read to be combined.
Measured for every layer of ResNet18 at (2, 100), (8, 16) and (16, 8) on two cores; values from 1.5
to 2.5 hardly differ.
"""


TILE = 2**24
"""The bytes of rows that are held at a time."""

LARGEST = 2**26
"""The bytes of products, windows or rows that an answer may allocate temporarily."""


F = TypeVar("F", bound="Divisible")


class Factor(ABC):
    """The M gradients of one leaf from one of its uses, in a cheaper form.

    Attributes:
        shape: The shape of the leaf.
        count: M.
        unit: The bounds given to `rows` must be multiples of this number of units.
    """

    shape: torch.Size
    count: int
    unit: int = 1

    @abstractmethod
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Return the rows on the leaf's units (dim 0) from low to high. (M, high - low, ...)."""

    @abstractmethod
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Compute Σ_m w_m row_m, with w = 1 by default; rows that are not live count as zero.

        Args:
            weights: (M,).
            live: (M,) bool; None means that all rows are live.
        """

    @abstractmethod
    def dot(self, leaf: Tensor) -> Tensor:
        """Return the product of every row with a leaf. (M,) float64."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Return the Gram of these rows, for this one use of the leaf. (M, M) float64."""

    @abstractmethod
    def sq_norms(self) -> Tensor:
        """Return the diagonal of `gram`. (M,)."""

    def sum_squares(self, weights: Tensor, live: Tensor | None) -> Tensor:
        """Compute Σ_m w_m row_m² per coordinate, tile by tile; rows not live count as zero.

        Args:
            weights: (M,).
            live: (M,) bool; None means that all rows are live.
        """
        weights = weights if live is None else torch.where(live, weights, 0.0)
        if not self.shape.numel():
            return weights.new_zeros(self.shape)
        parts = [_products.weighted_squares(weights, tile) for tile in tiles(self)]
        return torch.cat(parts).view(self.shape)


class Divisible(Factor):
    """A factor that can be split into groups of rows."""

    @abstractmethod
    def part(self, low: int, high: int) -> Self:
        """Return the factor of some of the M rows."""


def tiles(factor: Factor) -> Iterator[Tensor]:
    """Yield the rows (M, ...) of a factor, some of the leaf's units at a time."""
    if not factor.shape:
        yield factor.rows().reshape(factor.count, 1)
        return
    per_unit = factor.count * factor.shape[1:].numel() * 4
    units = factor.shape[0]
    step = max(factor.unit, TILE // max(per_unit, 1) // factor.unit * factor.unit)
    # Where one tile suffices, the step does not depend on M, which may be a symbol of a trace.
    step = min(max(units, 1), step)
    for low in range(0, units, step):
        rows = factor.rows(low, min(low + step, units))
        yield rows.reshape(factor.count, -1)


def tiled_gram(factor: Factor) -> Tensor:
    """Compute the Gram tile by tile. (M, M) float64."""
    total: Tensor | None = None
    for tile in tiles(factor):
        products = _products.inner(tile, tile)
        total = products if total is None else total.add_(products)
    assert total is not None
    return total


def tiled_sq_norms(factor: Factor) -> Tensor:
    """Compute the diagonal of the Gram tile by tile. (M,)."""
    return torch.stack([_products.row_sq_norms(tile) for tile in tiles(factor)]).sum(0)


@dataclass(eq=False)
class OuterFactor(Divisible):
    """row_m = Σ_t d_mt ⊗ a_mt: inputs a (M, n, d) and output gradients d (M, n, p) of a product.

    Its Gram needs no rows: ⟨d ⊗ a, d' ⊗ a'⟩ = ⟨d, d'⟩ ⟨a, a'⟩, so K is (D Dᵀ) ∘ (A Aᵀ), summed
    over the positions t of either row.

    The leaf (p, d) may have more dims: the first ones together have p entries, the others d. A leaf
    (d, p), of y = a W, has rows Σ_t a_mt ⊗ d_mt: inputs and output gradients are exchanged.
    """

    inputs: Tensor
    outputs: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        self.count = self.inputs.shape[0]

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Compute D_mᵀ A_m for all m by one batched product."""
        columns = self.outputs
        if low or high is not None:
            width = self.outputs.shape[-1] // self.shape[0]  # the entries of one unit
            columns = columns[..., low * width : None if high is None else high * width]
        columns = columns.mT
        # With one position per row it is an outer product, limited by memory bandwidth.
        single = self.inputs.shape[1] == 1
        rows = columns * self.inputs if single else torch.bmm(columns, self.inputs)
        units = len(range(self.shape[0])[low:high])
        return rows.view(self.count, units, *self.shape[1:])

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Compute Dᵀ A over all rows, with weighted output gradients."""
        outputs = weigh(self.outputs, weights, live)
        inputs = self.inputs if live is None else mask(self.inputs, live)
        return (outputs.flatten(0, 1).T @ inputs.flatten(0, 1)).view(self.shape)

    @override
    def sum_squares(self, weights: Tensor, live: Tensor | None) -> Tensor:
        """Compute Σ_m w_m d_m² ⊗ a_m² by one product if every row has one position."""
        if self.inputs.shape[1] != 1:
            return super().sum_squares(weights, live)
        inputs, outputs = map(_tree.at_least_float32, (self.inputs, self.outputs))
        outputs = weigh(outputs.square(), weights, live).flatten(0, 1)
        inputs = (inputs if live is None else mask(inputs, live)).square().flatten(0, 1)
        return (outputs.T @ inputs).view(self.shape)

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        """Compute Σ_t ⟨d_mt, V a_mt⟩ by a product like that of the forward pass."""
        matrix = leaf.reshape(self.outputs.shape[-1], self.inputs.shape[-1])
        return paired(self.inputs @ matrix.T.to(self.inputs.dtype), self.outputs)

    @override
    def part(self, low: int, high: int) -> Self:
        return replace(self, inputs=self.inputs[low:high], outputs=self.outputs[low:high])

    @override
    def gram(self) -> Tensor:
        """Compute the ghost Gram, or the Gram of the rows if that is cheaper."""
        (n, p), d = self.outputs.shape[1:], self.inputs.shape[2]
        if ghost_flops(self.count, n, p, d) is None:
            return tiled_gram(self)
        return ghost_gram(self.inputs, self.outputs)

    @override
    def sq_norms(self) -> Tensor:
        """Compute the ghost Gram's diagonal in blocks, or from the rows if they are smaller."""
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
            return products.sum((1, 2), dtype=_tree.sum_dtype(products)).clamp(min=0)
        return _products.row_sq_norms(self.rows().flatten(1))


def first_scaled(factor: Factor, count: int, scale: Tensor | None) -> Factor:
    """Return the factor of the first rows, multiplied by ``scale`` (M,); a row of 0 is masked."""
    live = None if scale is None else scale != 0
    if type(factor) is not OuterFactor:
        return DenseFactor(weigh(factor.rows()[:count], scale, live))
    found = factor.part(0, count)
    if live is None:
        return found
    outputs = weigh(found.outputs, scale, live)
    return replace(found, inputs=mask(found.inputs, live), outputs=outputs)


def join_uses(factors: list[Factor]) -> list[Factor]:
    """Join the outer products of several uses of a leaf: the positions of all uses are one sum."""
    joined: dict[tuple[int, int], list[OuterFactor]] = {}
    others: list[Factor] = []
    for factor in factors:
        if type(factor) is OuterFactor:
            size = factor.outputs.shape[-1], factor.inputs.shape[-1]
            joined.setdefault(size, []).append(factor)
        else:
            others.append(factor)
    sums = (uses[0] if len(uses) == 1 else _joined(uses) for uses in joined.values())
    return [*sums, *others]


def _joined(uses: list[OuterFactor]) -> OuterFactor:
    inputs = torch.cat([use.inputs for use in uses], 1)
    return OuterFactor(inputs, torch.cat([use.outputs for use in uses], 1), uses[0].shape)


def by_rows(factor: F, bytes_of_row: int, answer: Callable[[F], Tensor]) -> Tensor:
    """Compute an answer (M, ...) for some rows at a time, given the bytes that one row takes."""
    step = max(1, LARGEST // max(bytes_of_row, 1))
    if step >= factor.count:
        return answer(factor)
    parts = (factor.part(low, low + step) for low in range(0, factor.count, step))
    return torch.cat([answer(part) for part in parts])


def ghost_flops(count: int, n: int, p: int, d: int) -> int | None:
    """Return the flops of the ghost Gram of (M, n, p) and (M, n, d), or None if rows are cheaper.

    Ghost products take N (p + d), N = M n, where rows and their Gram take p d (n + M). Without
    positions there is nothing to multiply.
    """
    if not n:
        return None
    products = count * n * (p + d)
    return 2 * count * n * products if products < LARGE_SUM * p * d * (1 + count / n) else None


def ghost_gram(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Compute Σ_tt' ⟨a_mt, a_m't'⟩ ⟨d_mt, d_m't'⟩ for (M, n, d) and (M, n, p). (M, M) float64.

    From 256 positions on, only the lower half is computed, in four steps or more, so that the
    products stay small. With fewer positions, the extra calls cost more than they save.
    """
    count, n = inputs.shape[:2]
    # An int also in a trace whose sizes are symbols: a loop has to know how often it runs.
    step = -(-count // int(min(max(1, count * n // 128), 4)))
    step = min(step, max(1, LARGEST // (4 * count * n * n)))
    a, d = _tree.at_least_float32(inputs), _tree.at_least_float32(outputs)
    if step == count:
        return _ghost_products(a, d, a, d)
    gram = torch.empty(count, count, dtype=_tree.sum_dtype(a), device=a.device)
    for i in range(-(-count // step)):
        low = i * step
        high = min(low + step, count)
        block = _ghost_block(a[low:], d[low:], high - low)
        gram[low:, low:high] = block
        gram[low:high, high:] = block[high - low :].T
    return gram


def ghost_between(own: OuterFactor, other: OuterFactor) -> Tensor:
    """Compute the products of the rows of two factors without the rows. (k, l) float64."""
    tensors = (own.inputs, own.outputs, other.inputs, other.outputs)
    return _ghost_products(*map(_tree.at_least_float32, tensors))


def _ghost_block(a: Tensor, d: Tensor, width: int) -> Tensor:
    """Compute the first columns of the ghost Gram."""
    return _ghost_products(a, d, a[:width], d[:width])


def _ghost_products(a: Tensor, d: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Compute Σ_tt' ⟨a_mt, b_m't'⟩ ⟨d_mt, e_m't'⟩. (k, l) float64."""
    (count, n), width = a.shape[:2], b.shape[0]
    with _tree.no_autocast(a):
        products = (a.flatten(0, 1) @ b.flatten(0, 1).T).mul_(d.flatten(0, 1) @ e.flatten(0, 1).T)
    if n == 1:
        return products.to(_tree.sum_dtype(a))
    sums = products.view(-1, width, n).sum(2, dtype=_tree.sum_dtype(a))
    return sums.view(count, n, width).sum(1)


def weigh(tensor: Tensor, weights: Tensor | None, live: Tensor | None) -> Tensor:
    """Multiply every row of (M, ...) by its weight; rows that are not live become exactly 0."""
    if weights is not None:
        wide = _tree.at_least_float32(tensor)
        tensor = (wide * along_rows(weights.to(wide.dtype), wide)).to(tensor.dtype)
    return tensor if live is None else mask(tensor, live)


def mask(tensor: Tensor, live: Tensor) -> Tensor:
    """Replace the rows of (M, ...) that are not live by 0."""
    return torch.where(along_rows(live, tensor), tensor, 0.0)


def paired(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner products of equal rows of two tensors (M, ...). (M,) float64."""
    product = _tree.at_least_float32(a) * _tree.at_least_float32(b)
    return product.flatten(1).sum(1, dtype=_tree.sum_dtype(product))


def along_rows(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values (M,) in a shape that broadcasts against (M, ...)."""
    return values.view(-1, *[1] * (tensor.ndim - 1))


# --- Rows that are held because they are small ---


@dataclass(eq=False, init=False)
class DenseFactor(Factor):
    """The rows (M, *shape) themselves."""

    held: Tensor

    def __init__(self, held: Tensor) -> None:
        self.held = held
        self.count, self.shape = held.shape[0], held.shape[1:]

    def _matrix(self) -> Tensor:
        return self.held.reshape(self.count, -1)

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        return self.held if self.held.ndim == 1 else self.held[:, low:high]

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        if weights is None:
            if live is None:
                return self.held.sum(0) if self.count > 1 else self.held[0]
            weights = live.to(_tree.sum_dtype(self.held))
        if live is None:
            rows = _tree.at_least_float32(self._matrix())
            with _tree.no_autocast(rows):
                total = weights.to(rows.dtype) @ rows
            return total.view(self.shape).to(self.held.dtype)
        return _products.weighted_sum(weights, self._matrix()).view(self.shape).to(self.held.dtype)

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        return _products.inner(self._matrix(), leaf.reshape(1, -1))[:, 0]

    @override
    def gram(self) -> Tensor:
        matrix = self._matrix()
        return _products.inner(matrix, matrix)

    @override
    def sq_norms(self) -> Tensor:
        return _products.row_sq_norms(self._matrix())


JOINED = ""
"""The name of the factor that joins several leaves."""


def small_rows(held: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
    """Return those of the named leaves whose rows are held and small."""
    return [
        name
        for name, rows in held.items()
        if name in names and rows.numel() < _products.SMALL * rows.shape[0]
    ]


def join_rows(held: Mapping[str, Tensor], names: list[str]) -> tuple[dict[str, Factor], Tree]:
    """Join leaves whose rows are held into one factor.

    Returns:
        The factor under `JOINED`, and the rows of every leaf as views of it; none of leaves in half
        precision, which are wider in the factor.
    """
    if not names:
        return {}, {}
    rows = [held[name] for name in names]
    matrices = torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in rows], 1)
    joined = _tree.at_least_float32(matrices)
    parts = torch.split_with_sizes(joined, [leaf.shape[1:].numel() for leaf in rows], 1)
    views = {
        name: part.view(leaf.shape)
        for name, leaf, part in zip(names, rows, parts, strict=True)
        if leaf.dtype == joined.dtype
    }
    return {JOINED: DenseFactor(joined)}, views


def split_joined(total: Tensor, names: list[str], shapes: Mapping[str, torch.Size]) -> Tree:
    """Split a combination of joined rows into its leaves."""
    parts = torch.split_with_sizes(total, [shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}


# --- Several uses of one leaf, or too many rows to hold: summed tile by tile ---


@dataclass(eq=False)
class TiledFactor(Factor):
    """The sum of the rows of several factors of one leaf.

    The Gram of a sum is not the sum of the Grams: a weight that is used twice has cross terms. So
    the rows are computed for some of the leaf's units at a time, and discarded.

    Attributes:
        parts: One factor for each use of the leaf.
    """

    parts: list[Factor]

    def __post_init__(self) -> None:
        self.count, self.shape = self.parts[0].count, self.parts[0].shape
        self.unit = max(part.unit for part in self.parts)

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        rows = self.parts[0].rows(low, high)
        for part in self.parts[1:]:
            rows = rows + part.rows(low, high)
        return rows

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        total = self.parts[0].total(weights, live)
        for part in self.parts[1:]:
            total = total + part.total(weights, live)
        return total

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        return torch.stack([part.dot(leaf) for part in self.parts]).sum(0)

    @override
    def gram(self) -> Tensor:
        """Compute the Gram tile by tile."""
        return tiled_gram(self)

    @override
    def sum_squares(self, weights: Tensor, live: Tensor | None) -> Tensor:
        """Compute the sum tile by tile, or take that of the only part."""
        if len(self.parts) == 1:
            return self.parts[0].sum_squares(weights, live)
        return super().sum_squares(weights, live)

    @override
    def sq_norms(self) -> Tensor:
        """Compute the norms tile by tile, or take those of the only part."""
        if len(self.parts) == 1:
            return self.parts[0].sq_norms()
        return tiled_sq_norms(self)


# --- The rows of an embedding table ---


@dataclass(eq=False)
class EmbeddingFactor(Divisible):
    """row_m = Σ_t e(index_mt) ⊗ grad_mt: indices (M, n) and output gradients (M, n, width)."""

    index: Tensor
    grads: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        self.count = self.index.shape[0]

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Scatter the output gradients into the table's units from low to high."""
        units = len(range(self.shape[0])[low:high])
        index, grads = self.index - low, self.grads
        if units < self.shape[0]:
            inside = (index >= 0) & (index < units)
            index, grads = torch.where(inside, index, 0), grads * inside[..., None]
        first = torch.arange(self.count, device=index.device)[:, None] * units
        table = grads.new_zeros(self.count * units, self.shape[1])
        table.index_add_(0, (index + first).flatten(), grads.flatten(0, 1))
        return table.view(self.count, units, self.shape[1])

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Scatter the weighted output gradients into one table."""
        grads = weigh(self.grads, weights, live).flatten(0, 1)
        return grads.new_zeros(self.shape).index_add_(0, self.index.flatten(), grads)

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        """Look up the leaf, and pair the result with the output gradients."""
        return paired(leaf[self.index].to(self.grads.dtype), self.grads)

    @override
    def part(self, low: int, high: int) -> Self:
        return replace(self, index=self.index[low:high], grads=self.grads[low:high])

    @override
    def gram(self) -> Tensor:
        """Sum products of positions that share a unit, or use the rows if that is cheaper."""
        n = self.index.shape[1]
        if n * n > self.shape[0]:
            return tiled_gram(self)
        index, grads = self.index.flatten(), _tree.at_least_float32(self.grads).flatten(0, 1)
        gram = torch.empty(
            self.count, self.count, dtype=_tree.sum_dtype(grads), device=grads.device
        )
        with _tree.no_autocast(grads):
            for m in range(self.count):  # the products of one row at a time
                own = slice(m * n, (m + 1) * n)
                products = grads[own] @ grads[: (m + 1) * n].T
                same = index[own, None] == index[None, : (m + 1) * n]
                # torch.where, because 0 times a non-finite number of another unit is NaN.
                shared = torch.where(same, products, 0.0).view(n, m + 1, n)
                gram[m, : m + 1] = gram[: m + 1, m] = shared.sum((0, 2), dtype=gram.dtype)
        return gram

    @override
    def sq_norms(self) -> Tensor:
        """Compute the diagonal of `gram`; with many positions, from the sums per unit."""
        n, width = self.grads.shape[1:]
        if n <= width:
            return by_rows(self, 12 * n * n, EmbeddingFactor._sq_norms_of_pairs)
        return by_rows(self, 12 * n * width, EmbeddingFactor._sq_norms_of_sums)

    def _sq_norms_of_pairs(self) -> Tensor:
        grads = _tree.at_least_float32(self.grads)
        with _tree.no_autocast(grads):
            products = torch.bmm(grads, grads.mT)
        same = self.index[:, :, None] == self.index[:, None, :]
        norms = torch.where(same, products, 0.0).sum((1, 2), dtype=_tree.sum_dtype(grads))
        return norms.clamp(min=0)

    @override
    def sum_squares(self, weights: Tensor, live: Tensor | None) -> Tensor:
        """Sum the positions of each unit in a row, and scatter the weighted squares."""
        sums, place, begins, index = self._sums()
        squares = weigh(sums.square()[place].view(*index.shape, -1), weights, live)
        squares = torch.where(begins[..., None], squares, 0.0).flatten(0, 1)
        return squares.new_zeros(self.shape).index_add_(0, index.flatten(), squares)

    def _sq_norms_of_sums(self) -> Tensor:
        sums, place, begins, index = self._sums()
        norms = _products.row_sq_norms(sums)[place].view(index.shape)
        return torch.where(begins, norms, 0.0).sum(1)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sort the positions by unit and sum those of one unit: no more sums than positions.

        Returns:
            The sums (M·n, width), the sum that each position belongs to (M·n,), whether a position
            is the first of its unit (M, n), and the unit (M, n).
        """
        index, order = self.index.sort(1)
        begins = torch.ones_like(index, dtype=torch.bool)
        torch.ne(index[:, 1:], index[:, :-1], out=begins[:, 1:])
        place = begins.flatten().cumsum(0) - 1  # the unit that a position belongs to
        grads = _tree.at_least_float32(self.grads)
        grads = grads.gather(1, order[..., None].expand_as(grads)).flatten(0, 1)
        sums = torch.zeros_like(grads).index_add_(0, place, grads)
        return sums, place, begins, index
