"""Find tensors that share memory with those that will be written: refuse them, or copy them."""

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


def copied_where_shared(tree: Any, written: Any) -> Any:
    """Return a tree with copies of the tensors whose memory belongs to one that will be written.

    Args:
        tree: What is read after the write.
        written: A tree of the tensors that will be written.
    """
    if not any(isinstance(leaf, Tensor) for leaf in _tree.leaves(tree)):
        return tree
    memory = _memory_of(_tree.leaves(written))
    return _tree.tree_map(lambda leaf: _copied_if_in(leaf, memory), tree)


def copied_before_writing(new: Any, old: Any, shown: Any) -> tuple[Any, Any]:
    """Copy what would change while one tree is written into another.

    A state may hold parameters, or what another entry held: ``{"last": params, "before":
    state["last"]}``. Such a leaf must be read before the write to the tensor that it shows.

    Args:
        new: What will be written, leaf by leaf.
        old: A tree of the same structure, into which it will be written.
        shown: What is read after the write, such as metrics.

    Returns:
        ``new`` and ``shown`` with these copies.
    """
    written: list[Any] = []
    _tree.tree_map(lambda o, n: None if o is n else written.append(o), old, new)
    memory = _memory_of(written)
    copied = _tree.tree_map(lambda o, n: n if o is n else _copied_if_in(n, memory), old, new)
    return copied, _tree.tree_map(lambda leaf: _copied_if_in(leaf, memory), shown)


def _memory_of(leaves: Iterable[Any]) -> set[int] | None:
    """Return the storages of tensors, or None where tensors have none: under a compiler."""
    if followed():
        return None
    return {storage_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def _copied_if_in(leaf: Any, memory: set[int] | None) -> Any:
    """Copy a tensor if it is in this memory. A compiler removes copies that are not needed."""
    if isinstance(leaf, Tensor) and (memory is None or storage_of(leaf) in memory):
        return leaf.clone()
    return leaf


def storage_of(tensor: Tensor) -> int:
    """Return the identity of the storage that a tensor is a view of."""
    # This runs for every leaf of a donated step; most are not sharded.
    own = tensor if type(tensor) in (Tensor, nn.Parameter) else local(tensor)
    identity: int = own.untyped_storage()._cdata
    return identity


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
