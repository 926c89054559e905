"""The settings of a convolution, and the calls of torch that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads.fused._factors import ghost_flops


@dataclass(frozen=True)
class Geometry:
    """All settings of a convolution except its weight; sizes are one number per dim."""

    dims: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def is_product(self) -> bool:
        """True if the convolution is a product of its windows, laid out as a matrix."""
        return self.groups == 1 and not self.transposed

    def ghost_flops(self, count: int, n: int, weight: torch.Size) -> int | None:
        """Return the flops of a weight's ghost Gram; None if there is none or rows are cheaper.

        Args:
            count: M.
            n: The positions of the output in a row.
            weight: The weight's shape.
        """
        return ghost_flops(count, n, weight[0], weight[1:].numel()) if self.is_product else None

    @property
    def _settings(self) -> tuple[Any, ...]:
        """The settings in the order of torch's arguments."""
        sizes = self.stride, self.padding, self.dilation
        return *sizes, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the convolution to inputs (N, channels, ...)."""
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, *self._settings)
        return y

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
        backward: Any = torch.ops.aten.convolution_backward
        return backward(grad, x, weight, None, *self._settings, wanted)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input."""
        found: Tensor = self._backward(grad, x, weight, [True, False, False])[0]
        return found

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight, summed over N."""
        found: Tensor = self._backward(grad, x, weight, [False, True, False])[1]
        return found
