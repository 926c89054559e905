"""The autograd function that all operation overrides share: `RowOperation`.

An override runs one kernel over the tensors of all rows, (M, ...), while autograd must get a
gradient for every row. An operation says how to compute the output and the gradients;
`RowOperation.apply` does the rest: it saves tensors, and leaves the gradients of weight and bias as
factors on the tape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter.grads.fused._factors import Factor
from gradfilter.grads.fused._tape import Tape, Weight

W = TypeVar("W", Tensor, "Tensor | None")
"""The weight's type: ``Tensor | None`` for operations that also run without a weight."""

Saved = tuple[Tensor | None, ...]
"""The tensors that an operation saves in its forward pass."""


class NeedsGrad(NamedTuple):
    """The operands whose gradients a backward pass needs."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The gradients of one operation in all rows; None for those that are not needed.

    Attributes:
        input: The gradient of the input. (M, ...).
        weight: The M gradients of the weight.
        bias: The M gradients of the bias.
    """

    input: Tensor | None = None
    weight: Factor | None = None
    bias: Factor | None = None


class RowOperation(ABC, Generic[W]):
    """An operation on an input (M, ...), whose weight and bias all rows share.

    Its attributes are what the operation needs in addition: sizes, groups, eps.
    """

    @abstractmethod
    def forward(self, x: Tensor, weight: W, bias: Tensor | None) -> tuple[Tensor, Saved]:
        """Return the output (M, ...), and the tensors that `backward` needs."""

    @abstractmethod
    def backward(
        self, grad: Tensor, saved: Any, weight: W, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        """Return the gradients that are needed.

        Args:
            grad: The gradient of the output. (M, ...).
            saved: The tensors that `forward` saved.
            weight: The weight, without a leading axis.
            bias: The bias, without a leading axis.
            needs_grad: The gradients to compute.
        """

    def apply(self, tape: Tape, x: Tensor, weight: Weight | None, bias: Weight | None) -> Tensor:
        """Run the operation, and record its weight's and bias's gradients in the backward pass."""
        weight_rows = None if weight is None else weight.rows
        bias_rows = None if bias is None else bias.rows
        if tape.sharded.leaves:
            tape.expect(weight)
            tape.expect(bias)
        y: Tensor = _RowFunction.apply(x, weight_rows, bias_rows, self, weight, bias, tape)
        return y


class _RowFunction(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        weight_rows: Tensor | None,
        bias_rows: Tensor | None,
        operation: RowOperation[Any],
        weight: Weight | None,
        bias: Weight | None,
        tape: Tape,
    ) -> Tensor:
        value = None if weight is None else weight.value
        y, saved = operation.forward(x, value, None if bias is None else bias.value)
        ctx.save_for_backward(*saved)
        ctx.operation, ctx.weight, ctx.bias, ctx.tape = operation, weight, bias, tape
        return _without_view(y)

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        weight, bias = ctx.weight, ctx.bias
        found = ctx.operation.backward(
            grad_outputs[0],
            ctx.saved_tensors,
            None if weight is None else weight.value,
            None if bias is None else bias.value,
            NeedsGrad(*ctx.needs_input_grad[:3]),
        )
        weight_grad = bias_grad = None
        if found.weight is not None:
            weight_grad = ctx.tape.record(weight, found.weight)
        if found.bias is not None:
            bias_grad = ctx.tape.record(bias, found.bias)
        return found.input, weight_grad, bias_grad, None, None, None, None


def _without_view(output: Tensor) -> Tensor:
    """Return an output that is not a view: torch refuses to write into a Function's view."""
    if not output._is_view():
        return output
    found: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return found
