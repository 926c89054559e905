"""Convert one row's view of a tensor to the tensor of all rows, and back.

Inside ``torch.func.vmap`` a tensor of all rows (M, ...) looks like one row (...). An override
that runs one kernel over all rows unwraps the tensors of all rows, computes with them under
ordinary autograd, and wraps the result again. An ``autograd.Function`` with a ``vmap`` staticmethod
can do the same by documented means, but takes 95 µs per call instead of 15: half a millisecond on
an MLP whose whole step takes eight. All use of undocumented parts of torch's vmap is in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from torch._functorch.predispatch import (
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    lazy_load_decompositions,
)
from typing_extensions import override

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Level:
    """One level of vmap over ``rows`` rows."""

    rows: int
    number: int

    @classmethod
    @contextmanager
    def entered(cls, rows: int) -> Iterator[Level]:
        """Run under ``vmap(..., randomness="different")``, without its handling of trees."""
        lazy_load_decompositions()
        number = _vmap_increment_nesting(rows, "different")
        try:
            yield cls(rows, number)
        finally:
            _vmap_decrement_nesting()

    def is_innermost(self) -> bool:
        """Return whether the loss runs no torch.func transform of its own inside this level."""
        top = _functorch.peek_interpreter_stack()
        return top is not None and top.level() == self.number

    def is_left(self) -> bool:
        """Return whether the present call runs outside of this level, on tensors of all rows."""
        return _functorch.peek_interpreter_stack() is None

    def batched(self, value: Any) -> bool:
        """Return whether a value is a tensor that has rows at this level."""
        return (
            isinstance(value, Tensor)
            and _functorch.is_batchedtensor(value)
            and _functorch.maybe_get_level(value) == self.number
        )

    def rows_of(self, value: Any) -> Tensor | None:
        """Return the tensor of all rows, (M, ...), of a value that has rows, else None."""
        if not (
            isinstance(value, Tensor)  # as `batched`, which is one more call for every operand
            and _functorch.is_batchedtensor(value)
            and _functorch.maybe_get_level(value) == self.number
        ):
            return None
        tensor = _functorch.get_unwrapped(value)
        place = _functorch.maybe_get_bdim(value)
        return tensor if place == 0 else tensor.movedim(place, 0)

    def lower(self, value: Tensor) -> Tensor:
        """Return the tensor of all rows, (M, ...); a tensor that all rows share gets stride 0."""
        rows = self.rows_of(value)
        return value.expand(self.rows, *value.shape) if rows is None else rows

    def wrap(self, value: Any) -> Any:
        """Return the row's view of a tensor (M, ...), or of a tuple of them."""
        if isinstance(value, tuple):
            return tuple(self.wrap(item) for item in value)
        return _functorch._add_batch_dim(value, 0, self.number)

    def wrap_all(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the row's view of every tensor (M, ...)."""
        return [_functorch._add_batch_dim(tensor, 0, self.number) for tensor in tensors]

    def lift_call(self, compute: Callable[..., Any], *args: Any) -> Any:
        """Run ``compute`` on the tensors of all rows, and wrap the result for one row."""
        with AllRows():
            found = compute(*args)
        return self.wrap(found)

    def on_all_rows(self) -> AbstractContextManager[None]:
        """Return a context that leaves vmap, in order to compute with the tensors of all rows."""
        return AllRows()


class AllRows(AbstractContextManager[None]):
    """Leaves vmap inside the context, if it was not left before.

    torch's own context for it takes three times the calls, and cannot be entered again inside.
    """

    @override
    def __enter__(self) -> None:
        inside = _functorch.peek_interpreter_stack() is not None
        self._level = _functorch.pop_dynamic_layer_stack() if inside else None

    @override
    def __exit__(self, *error: object) -> None:
        if self._level is not None:
            _functorch.push_dynamic_layer_stack(self._level)


def of_all_samples(
    function: Callable[..., Any], dims: int, input: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run a function of images (B, channels, ...) or (channels, ...) on those of all rows.

    This is vmap's own rule, which turns symbolic sizes into numbers.

    Args:
        function: The function.
        dims: The number of dims of an image without its channels.
        input: The images, inside or outside of vmap.
        *args: Further arguments, none of which has rows.
        **kwargs: The same.
    """
    levels = _functorch.get_interpreter_stack() or ()
    number = levels[0].level() if len(levels) == 1 else 0
    rows = Level(0, number).rows_of(input)
    if rows is None or rows.ndim not in (dims + 2, dims + 3):
        return function(input, *args, **kwargs)
    lead = rows.shape[: rows.ndim - dims - 1]  # M, or M and B
    call = partial(function, rows.flatten(0, len(lead) - 1), *args, **kwargs)
    return Level(rows.shape[0], number).lift_call(partial(_with_dims, call, lead))


def _with_dims(call: Callable[[], Any], lead: torch.Size) -> Any:
    """Return the result of a call, a tensor or several, with its first dim split into several."""
    found = call()
    several = isinstance(found, tuple)
    parts = tuple(y.view(*lead, *y.shape[1:]) for y in (found if several else (found,)))
    return parts if several else parts[0]


@contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """Keep torch from warning that vmap runs an operation row by row.

    Python's own filters would do it too, but changing them makes every other warning appear again.
    """
    module: Any = _functorch
    module._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        module._set_vmap_fallback_warning_enabled(True)


def unwrapped(value: Tensor) -> Tensor:
    """Return the tensor of all rows behind a row of any level, with its rows in any dim."""
    return _functorch.get_unwrapped(value) if _functorch.is_batchedtensor(value) else value


def is_shared(rows: Tensor) -> bool:
    """Return whether all rows of (M, ...) are the same tensor, repeated by a stride of 0."""
    return rows.stride(0) == 0


def repeated(value: Tensor, count: int) -> Tensor:
    """Repeat a tensor for ``count`` rows, (M, ...) with a stride of 0, also for one row."""
    return value.as_strided((count, *value.shape), (0, *value.stride()))


UNTRACED = (
    "a pass over rows is not traced by torch.compile; gradfilter.compile(step) makes one graph of "
    "the whole step"
)
"""What torch.compile and its logs say of a pass."""


def untraced(function: F) -> F:
    """Exclude a function from ``torch.compile``: traced, it may silently give wrong gradients.

    The caller may run untraced, after the compiler gave up on it, and the compiler would still
    trace the functions that it calls.
    """
    if torch.compiler.is_compiling():
        disable: Any = torch.compiler.disable
        return cast(F, disable(function, reason=UNTRACED))
    if "torch._dynamo" not in sys.modules:  # importing the compiler takes a second
        return function
    return cast(F, partial(_call_untraced(), function))


@cache
def _call_untraced() -> Callable[..., Any]:
    """Return one shared wrapper, because wrapping takes ten times as long as a call."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    disable: Any = torch.compiler.disable
    untraced_call: Callable[..., Any] = disable(call, reason=UNTRACED)
    return untraced_call


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of an enabled autocast, or None."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


autocast_any: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Returns whether autocast is enabled for some device."""


def autocast_names(device: str) -> set[str]:
    """Return the operations that autocast knows on a device in this version of torch."""
    key = f"Autocast{'CPU' if device == 'cpu' else device.upper()}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name.removeprefix("aten::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and has_kernel(name, key)
    }
