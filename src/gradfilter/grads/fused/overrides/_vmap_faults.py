"""Replace or refuse the operations that vmap itself computes wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import is_shared
from gradfilter.grads.fused.overrides._spellings import spellings


def roll(input: Tensor, *_: Any, **__: Any) -> Any:
    """Replace `torch.roll` of a 0-d tensor, which vmap would roll along the rows."""
    return NotImplemented if input.ndim else input.clone()


def select_scatter(host: Host, input: Tensor, src: Tensor, dim: int, index: int) -> Any:
    """Replace `torch.select_scatter`; vmap counts the gradient of ``src`` twice."""
    if not host.batched(input, src):
        return NotImplemented
    units = torch.arange(input.shape[dim], device=input.device)
    here = units == index % input.shape[dim]
    return torch.where(
        _broadcast_along(here, dim, input), src.unsqueeze(dim).to(input.dtype), input
    )


def index_fill(host: Host, input: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    """Replace `torch.index_fill` of a shared tensor by a value per row: wrong gradients."""
    if host.batched(input) or not host.batched(value):
        return NotImplemented
    units = torch.zeros(input.shape[dim], dtype=torch.bool, device=input.device)
    here = units.index_fill(0, index, True)
    return torch.where(_broadcast_along(here, dim, input), value.to(input.dtype), input)


def _broadcast_along(units: Tensor, dim: int, like: Tensor) -> Tensor:
    return units.view(-1, *[1] * (like.ndim - dim % like.ndim - 1))


def as_strided(
    host: Host,
    input: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    """Replace `torch.as_strided`: inside vmap a shared parameter has other strides."""
    rows = host.level.lower(input) if host.batched(input) else None
    if rows is None or not is_shared(rows):
        return NotImplemented
    if rows.storage_offset() or not rows[0].is_contiguous():
        raise RuntimeError(
            "as_strided of a view of a parameter cannot run over all rows at once. Index or "
            "reshape the parameter instead."
        )
    own = host.level.lift_call(torch.Tensor.contiguous, rows)
    return torch.as_strided(own, size, stride, storage_offset)


def as_strided_(host: Host, input: Tensor, *_: Any, **__: Any) -> Any:
    """Refuse `torch.Tensor.as_strided_`, which vmap applies to the rows as one tensor."""
    if not host.batched(input):
        return NotImplemented
    raise RuntimeError("as_strided_ cannot run over all rows at once. Use as_strided.")


def group_norm(function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run group norms of half precision in float32 under `torch.func.grad`.

    `torch.func.grad` allows a second derivative, so torch computes the gradient by a formula in
    the dtype of the input, where a plain backward pass runs a kernel that uses float32. The formula
    contains 1/σ³, which in float16 is infinite for σ < 0.025.
    """
    if input.element_size() >= 4:
        return NotImplemented

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    found = function(*map(wide, (input, *args)), **{k: wide(v) for k, v in kwargs.items()})
    return found.to(input.dtype)


UNDER_ANY_VMAP: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(spellings("roll"), roll),
    **{norm: partial(group_norm, norm) for norm in (F.group_norm, *spellings("group_norm"))},
}
"""Overrides for the vmap plan, which take no host."""

FAULTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(spellings("roll"), lambda host, *args, **kwargs: roll(*args, **kwargs)),
    **dict.fromkeys(spellings("select_scatter"), select_scatter),
    **dict.fromkeys(spellings("index_fill"), index_fill),
    **dict.fromkeys(spellings("as_strided"), as_strided),
    **dict.fromkeys(spellings("as_strided_copy"), as_strided),
    **dict.fromkeys(spellings("as_strided_"), as_strided_),
}


def refuse_nested(function: Callable[..., Any]) -> None:
    """Refuse such an operation inside a torch.func transform, where no override runs."""
    if function in FAULTS and function not in UNDER_ANY_VMAP:
        raise RuntimeError(
            f"{function.__name__} inside a transform of the loss's own cannot run over all rows at "
            "once."
        )
