"""Arithmetic on trees of tensors: the only file that touches ``torch.utils._pytree``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply a function leaf by leaf to trees of one structure."""
    if isinstance(tree, Tensor):
        return function(tree, *rest)
    # Parameters and states are dicts, and pairs of them. torch takes eight calls for each leaf.
    if type(tree) is dict and all(map(partial(_is_dict_of, tree.keys()), rest)):
        return {
            key: tree_map(function, value, *map(itemgetter(key), rest))
            for key, value in tree.items()
        }
    if type(tree) is tuple and all(type(t) is tuple and len(t) == len(tree) for t in rest):
        return tuple(tree_map(function, *parts) for parts in zip(tree, *rest, strict=True))
    return pytree.tree_map(function, tree, *rest)


def _is_dict_of(keys: Collection[Any], tree: Any) -> bool:
    return type(tree) is dict and tree.keys() == keys


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if type(tree) is dict else tree if type(tree) is tuple else None
    if parts is None:
        return list(pytree.tree_leaves(tree))
    return [leaf for part in parts for leaf in leaves(part)]


def flatten(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves, and a function that puts other leaves into the same structure."""
    if type(tree) in (tuple, list) and {*map(type, tree)} == {Tensor}:
        return list(tree), type(tree)  # most batches; the general way takes 20 calls
    values, spec = pytree.tree_flatten(tree)
    return list(values), lambda new: pytree.tree_unflatten(list(new), spec)


def flatten_with_names(tree: Any) -> tuple[dict[str, Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves under dotted names such as ``sgd.momentum.fc.weight``, and a rebuilder."""
    pairs, spec = pytree.tree_flatten_with_path(tree)
    named: dict[str, Any] = {}
    for path, value in pairs:
        name = ".".join(_key_text(key) for key in path)
        if name in named:
            raise ValueError(
                f"Two leaves share the dotted name {name!r}. Use keys without dots, or keys that "
                "stay apart when they are joined."
            )
        named[name] = value
    return named, lambda new: pytree.tree_unflatten(list(new), spec)


def _key_text(key: Any) -> str:
    """Return the text of one step of a path: a dict key, an index or an attribute name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over parameters: float64 if the device supports it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or a float32 copy of a half-precision one."""
    if tensor.dtype in (torch.float32, torch.float64):  # runs for every factor at every question
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


NO_CHANGE = nullcontext()


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the user's autocast does not apply to these products."""
    # Without autocast, which is usual, entering its context would cost more than a small product.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NO_CHANGE


def select(keep: Tensor | bool, new: T, old: T) -> T:
    """Return ``new`` if ``keep`` is true, else ``old``, bit for bit and without waiting.

    It uses ``torch.where`` leaf by leaf, because a product with 0 or 1 would lose the sign of −0.0
    and turn 0 · NaN into NaN.

    Args:
        keep: A bool, or a bool tensor of shape ().
        new: A tree of tensors.
        old: A tree of the same structure.

    Returns:
        A tree of the same structure. Leaves that are the same object in both pass unchanged.

    Examples:
        >>> import torch, gradfilter as gf
        >>> gf.select(torch.tensor(False), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
        {'w': tensor([0., 0.])}
    """

    def pick(n: Tensor, o: Tensor) -> Tensor:
        if n is o:
            return n
        return torch.where(as_bool_tensor(keep, n.device), n, o)

    chosen: T = tree_map(pick, new, old)
    return chosen


def as_bool_tensor(value: Tensor | bool, device: torch.device) -> Tensor:
    """Return a bool as a tensor of shape () that is created on the device, without a copy."""
    if isinstance(value, Tensor):
        if value.dtype != torch.bool or value.ndim:
            raise ValueError(
                f"Expected a bool or a bool tensor of shape (), found {value.dtype} of shape "
                f"{tuple(value.shape)}. Compare, and reduce with .all() or .any()."
            )
        return value.to(device)
    return torch.full((), value, dtype=torch.bool, device=device)


def donate_into(old: Any, new: Any) -> Any:
    """Write ``new`` into the storage of ``old`` and return ``old``."""
    return tree_map(lambda o, n: o if o is n else o.copy_(n), old, new)


def in_dtypes_of(model: Any, tree: Any) -> Any:
    """Convert a tree to the dtypes and the order of another one of the same structure.

    A half-precision leaf of shape () times a float64 scalar is promoted, unlike all other shapes.
    """
    return tree_map(lambda m, leaf: leaf.to(m.dtype), model, tree)


def zeros_like(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a tree of zeros."""
    return {name: torch.zeros_like(leaf) for name, leaf in tree.items()}


def no_update(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an update that changes no bit: −0.0, because p + 0.0 would turn −0.0 into +0.0."""
    return {name: torch.full_like(leaf, -0.0) for name, leaf in tree.items()}


def device_of(tree: Mapping[str, Tensor]) -> torch.device:
    """Return the device of the first leaf."""
    if not tree:
        raise ValueError("Expected at least one parameter, found none. Are all of them frozen?")
    return next(iter(tree.values())).device


def scalar(value: Any, like: Tensor) -> Tensor:
    """Return a number or tensor as a wide 0-d tensor on the device of ``like``."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=sum_dtype(like))
    # `full` runs on the device; `tensor` would copy from the host and wait for it.
    return torch.full((), value, device=like.device, dtype=sum_dtype(like))
