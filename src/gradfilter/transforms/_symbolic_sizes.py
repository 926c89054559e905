"""Trace with symbols in place of sizes, and decide for which sizes the trace holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from gradfilter.grads.fused._lift import of_all_samples

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(eq=False)
class SymbolicSizes:
    """The inputs of a trace whose sizes are symbols, and what the trace has asked of them.

    A question of the function about a size (``if n > 8``) is answered as for the sizes of the
    trace, and recorded as a condition. A size that was read as a number is a condition as well.

    Attributes:
        positions: The positions of these inputs.
        environment: Creates symbols and records the conditions; None without such inputs.
    """

    positions: tuple[int, ...]
    environment: ShapeEnv | None = None
    _inputs: list[Any] = field(default_factory=list, repr=False)
    _condition: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.positions:
            from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy

            self.environment = ShapeEnv()

    def inputs(self, mode: FakeTensorMode, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors without values for a trace."""
        chosen = set(self.positions)
        found = [
            _symbolic(mode, tensor, i)
            if i in chosen
            else mode.from_tensor(tensor, static_shapes=True)
            for i, tensor in enumerate(tensors)
        ]
        self._inputs = [found[i] for i in self.positions]
        return found

    def close(self) -> None:
        """Collect the conditions at the end of the trace."""
        if self.environment is not None:
            text = self.environment.produce_guards_expression(self._inputs, ignore_static=False)
            # Compiled once: it may take thousands of characters, and is evaluated in every step.
            self._condition = text and compile(text, "<conditions on sizes>", "eval")
            self._inputs = []

    def hold_for(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether inputs have sizes for which the trace holds."""
        if self.environment is None or self._condition is None:
            return True
        given = [_Layout(tensors[i]) for i in self.positions]
        try:
            return bool(self.environment.evaluate_guards_expression(self._condition, given))
        except ZeroDivisionError:  # an image smaller than a kernel: some output would be empty
            return False


def _symbolic(mode: FakeTensorMode, tensor: Tensor, position: int) -> Tensor:
    # Importing these takes a second.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    # Equal sizes share a symbol, so that inputs and targets have one number of samples.
    symbols: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * tensor.ndim)
    source = ConstantSource(f"input_{position}")
    lazy = tensor.is_conj() or tensor.is_neg()
    if tensor.storage_offset() and type(tensor) is Tensor and not lazy:
        # The place of a slice in its data set would be a number that the trace depends on.
        options: Any = {"dtype": tensor.dtype, "device": tensor.device}
        tensor = torch.empty_strided(tensor.size(), tensor.stride(), **options)
    fake: Tensor = mode.from_tensor(tensor, symbolic_context=symbols, source=source)
    return fake


class SymbolicRules(TorchFunctionMode):
    """Run dropout and pooling by operations that have rules for symbols, with the same results.

    The C++ code of torch's dropout, and of vmap's rules for pooling, asks for numbers.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace `torch.nn.functional.dropout` and pooling; run everything else as it is."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        dims = POOLING.get(func)
        if dims is not None and args:
            return of_all_samples(func, dims, *args, **kwargs)
        return func(*args, **kwargs)


POOLING: dict[Callable[..., Any], int] = {
    getattr(F, f"{kind}{dims}d"): dims
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for dims in (1, 2, 3)
}
"""The functions that vmap runs over the samples of all rows, and the dims of their windows."""


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0 or not 0 <= p <= 1:
        return F.dropout(input, p, training, inplace)
    noise = torch.empty_like(input, requires_grad=False).bernoulli_(1 - p)
    noise = noise if p == 1 else noise.div_(1 - p)
    return input.mul_(noise) if inplace else input * noise


@dataclass(frozen=True, eq=False)
class FixedSizes:
    """Sizes of inputs of a trace that holds for no others.

    Attributes:
        shapes: The shape of each input, by its position.
    """

    shapes: dict[int, torch.Size]

    def hold_for(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether inputs have these sizes."""
        return all(tensors[i].shape == shape for i, shape in self.shapes.items())


@dataclass(frozen=True, eq=False)
class _Layout:
    """The sizes and strides of a tensor; where it begins in memory is not a condition."""

    tensor: Tensor

    def size(self) -> torch.Size:
        return self.tensor.size()

    def stride(self) -> tuple[int, ...]:
        return self.tensor.stride()

    def storage_offset(self) -> int:
        return 0
