"""Check whether tensors that will be written share memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._readable import followed
from gradfilter._shards import is_sharded, local

Span = tuple[str, int, int, Tensor]
"""The device, the first and last address, and the tensor."""


def refuse_shared_memory(params: Any, state: Any) -> None:
    """Refuse to write results into tensors that share memory, which would be updated twice.

    Raises:
        ValueError: Two tensors share memory; the error names both.
    """
    if followed():
        return
    pair = _sharing([*_tree.leaves(params), *_tree.leaves(state)])
    if pair is None:
        return
    named = _tree.flatten_with_names({"params": params, "state": state})[0]
    names = [n for n, leaf in named.items() if any(leaf is tensor for tensor in pair)]
    raise ValueError(
        f"Expected parameters and state in memory of their own with donate=True, found "
        f"{names[0]!r} and {names[1]!r} in the same, which would be updated twice. Give a tied "
        "parameter once (named_parameters does), or omit donate."
    )


def _sharing(tensors: Iterable[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the first two among some tensors that share memory."""
    spans = sorted(_spans(tensors), key=lambda span: span[:3])
    open_: list[Span] = []
    for span in spans:
        open_ = [other for other in open_ if other[0] == span[0] and other[2] > span[1]]
        for other in open_:
            if _share(local(other[3]), local(span[3])):
                return other[3], span[3]
        open_.append(span)
    return None


def _spans(tensors: Iterable[Any]) -> Iterable[Span]:
    """Yield the spans of tensors, except those without memory or with several parts."""
    for tensor in tensors:
        known = type(tensor) in (Tensor, nn.Parameter) or (
            isinstance(tensor, Tensor) and is_sharded(tensor)
        )
        if known:
            own = local(tensor)
            if own.numel() and own.device.type != "meta" and own.layout == torch.strided:
                start = own.data_ptr()
                yield str(own.device), start, start + _extent(own), tensor


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first to the end of the last element."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()


def _share(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors with overlapping spans share an element: views may interlock."""
    size = a.element_size()
    first = min(a.data_ptr(), b.data_ptr())
    offsets = [t.data_ptr() - first for t in (a, b)]
    unlike = b.element_size() != size or any(offset % size for offset in offsets)
    if unlike or (a.is_contiguous() and b.is_contiguous()):
        return True
    length = max(offset + _extent(t) for offset, t in zip(offsets, (a, b), strict=True))
    taken = [torch.zeros(math.ceil(length / size), dtype=torch.bool) for _ in offsets]
    for flags, offset, tensor in zip(taken, offsets, (a, b), strict=True):
        flags.as_strided(tensor.shape, tensor.stride(), offset // size).fill_(True)
    return bool((taken[0] & taken[1]).any())
