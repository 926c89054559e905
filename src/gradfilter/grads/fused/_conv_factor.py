"""Compute the Gram, norms and sums of the rows of a convolution's weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _products, _tree
from gradfilter.grads.fused._conv_geometry import Geometry
from gradfilter.grads.fused._conv_windows import Layout, band_products, fastest, windows
from gradfilter.grads.fused._factors import (
    LARGEST,
    Divisible,
    OuterFactor,
    by_rows,
    ghost_between,
    ghost_gram,
    mask,
    paired,
    tiled_gram,
    weigh,
)


@dataclass(eq=False)
class ConvFactor(Divisible):
    """row_m is the weight gradient of inputs (M, B, in, ...) and output gradients (M, B, out, ...).

    With its windows laid out as a matrix a convolution is a product, so small maps have a ghost
    Gram. A transposed convolution is one with inputs and outputs exchanged.
    """

    inputs: Tensor
    outputs: Tensor
    weight: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        self.count, self.shape = self.inputs.shape[0], self.weight.shape
        groups = self.geometry.groups
        self.unit = len(self.weight) // groups if groups > 1 else 1

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        """Compute the rows as products of windows, or by one call each, whichever is faster.

        No kernel takes a batch of weight gradients.
        """
        weight, inputs, outputs = self.weight[low:high], self.inputs, self.outputs
        geometry = self.geometry
        if len(weight) < len(self.weight):
            inputs, outputs, geometry = self._tile(low, low + len(weight))
        part = replace(self, inputs=inputs, outputs=outputs, weight=weight, geometry=geometry)
        if part._layout() != "calls":
            n, _, d = part._sizes()
            return by_rows(part, 2 * n * d * inputs.element_size(), ConvFactor._rows_of_products)
        if inputs.shape[1] == 1 and geometry.is_product:
            return self._as_groups(inputs, outputs, weight)
        rows = inputs.new_empty(self.count, *weight.shape)
        for m in range(self.count):
            rows[m] = geometry.weight_grad(outputs[m], inputs[m], weight)
        return rows

    def _layout(self) -> Layout:
        if self.inputs.device.type != "cpu":
            return "calls"
        return fastest(self.shape, self.geometry, self.inputs.shape[1], self._sizes()[0])

    def _products(self) -> list[Tensor]:
        """Return the rows in parts: those of each tap of the first dim, or all. (M, out, ...)."""
        if self._layout() == "bands":
            kernel = self.shape[2:]
            return band_products(self.inputs, self.outputs, kernel, self.geometry)
        own = self._unfolded()
        return [torch.bmm(own.outputs.mT, own.inputs)]

    def _rows_of_products(self) -> Tensor:
        """Compute the rows as products of windows and output gradients."""
        parts = self._products()
        joined = torch.stack(parts, 2) if len(parts) > 1 else parts[0]
        taps = joined.view(self.count, self.shape[0], *self.shape[2:], self.shape[1])
        return taps.movedim(-1, 2).contiguous()

    def _as_groups(self, inputs: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
        """Compute rows of one sample each as the groups of one convolution, without copies."""
        geometry = replace(self.geometry, groups=self.count)
        every = weight.expand(self.count, *weight.shape).flatten(0, 1)
        x, grad = (t.reshape(1, -1, *t.shape[3:]) for t in (inputs, outputs))
        return geometry.weight_grad(grad, x, every).view(self.count, *weight.shape)

    def _tile(self, low: int, high: int) -> tuple[Tensor, Tensor, Geometry]:
        """Return inputs, output gradients and geometry of the units from low to high."""
        g = self.geometry
        units, fan = len(self.weight) // g.groups, self.inputs.shape[2] // g.groups
        if g.transposed:  # dim 0 runs over the inputs
            fan = self.outputs.shape[2] // g.groups
        first, last = low // units, (high - 1) // units
        if first != last and (low % units or high % units):
            raise AssertionError("a tile ends within a group or is within one")
        groups = slice(first * fan, (last + 1) * fan)
        geometry = replace(g, groups=last + 1 - first)
        if g.transposed:
            return self.inputs[:, :, low:high], self.outputs[:, :, groups], geometry
        return self.inputs[:, :, groups], self.outputs[:, :, low:high], geometry

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Compute one ordinary weight gradient from weighted output gradients."""
        outputs = weigh(self.outputs, weights, live)
        inputs = self.inputs if live is None else mask(self.inputs, live)
        return self.geometry.weight_grad(outputs.flatten(0, 1), inputs.flatten(0, 1), self.weight)

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        """Convolve the inputs with the leaf, and pair the result with the output gradients."""
        leaf = leaf.to(self.inputs.dtype)
        moved = self.geometry.forward(self.inputs.flatten(0, 1), leaf, None)
        return paired(moved.view(self.outputs.shape), self.outputs)

    @override
    def part(self, low: int, high: int) -> Self:
        return replace(self, inputs=self.inputs[low:high], outputs=self.outputs[low:high])

    @override
    def gram(self) -> Tensor:
        """Compute the ghost Gram of the windows, or the Gram of the rows if that is cheaper."""
        n, _, d = self._sizes()
        if self.geometry.ghost_flops(self.count, n, self.shape) is None:
            return tiled_gram(self)
        step = max(1, LARGEST // (4 * n * d))
        if step >= self.count:
            own = self._unfolded()
            return ghost_gram(own.inputs, own.outputs)
        # Windows are many times as large as the inputs, so only some rows are unfolded at a time.
        gram = torch.empty(self.count, self.count, dtype=_tree.sum_dtype(self.outputs))
        gram = gram.to(self.outputs.device)
        for low in range(0, self.count, step):
            own = self.part(low, low + step)._unfolded()
            for left in range(0, low + 1, step):
                other = own if left == low else self.part(left, left + step)._unfolded()
                block = ghost_between(own, other)
                gram[low : low + step, left : left + step] = block
                gram[left : left + step, low : low + step] = block.T
        return gram

    @override
    def sq_norms(self) -> Tensor:
        """Compute the norms from the windows if maps are small, else from the rows."""
        n, p, d = self._sizes()
        if self.geometry.is_product and 2 * n * n <= p * d:
            return by_rows(self, 4 * n * (2 * n + d), ConvFactor._sq_norms_of_windows)
        size = self.inputs.element_size()
        held = p * d if self._layout() == "calls" else 2 * n * d
        return by_rows(self, held * size, ConvFactor._sq_norms_of_rows)

    def _sq_norms_of_windows(self) -> Tensor:
        return self._unfolded().sq_norms()

    def _sq_norms_of_rows(self) -> Tensor:
        if self._layout() == "calls":
            return _products.row_sq_norms(self.rows().flatten(1))
        norms = [_products.row_sq_norms(part.flatten(1)) for part in self._products()]
        return torch.stack(norms).sum(0)

    def _sizes(self) -> tuple[int, int, int]:
        """Return the positions per row, and the two sides of the weight as a matrix: n, p, d."""
        _, samples, _, *extents = self.outputs.shape
        return samples * math.prod(extents), self.shape[0], self.shape[1:].numel()

    def _unfolded(self) -> OuterFactor:
        """Return the same rows as the factor of a product, with columns in another order."""
        outputs = self.outputs.movedim(2, -1).flatten(1, -2)  # (M, n, out)
        inputs = windows(self.inputs, self.shape[2:], self.outputs.shape[3:], self.geometry)
        return OuterFactor(inputs, outputs, self.shape)
