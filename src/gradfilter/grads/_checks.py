"""What stacks of every kind check and do with the factors on their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree


def check_per_row(what: str, values: Tensor, count: int) -> None:
    """Refuse anything but one real number per row."""
    if not isinstance(values, Tensor) or values.is_complex():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"Expected {what}s as a tensor of {count} real numbers, found {found}. Use "
            f"torch.tensor([...]) with one {what} per row."
        )
    if values.shape != (count,):
        raise ValueError(
            f"Expected {what}s of shape ({count},), found {tuple(values.shape)}. Give one {what} "
            "per row."
        )


def check_same_leaves(
    own: Mapping[str, torch.Size], given: Mapping[str, Tensor], question: str
) -> None:
    """Refuse a tree whose leaves, or their shapes, are not those of the rows."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Expected a dict[str, Tensor] in `{question}`, found {type(given).__name__}. Name "
            "every leaf as the parameters are named."
        )
    if set(own) != set(given):
        raise ValueError(
            f"Expected the leaves {sorted(own)} in `{question}`, missing "
            f"{sorted(set(own) - set(given))}, extra {sorted(set(given) - set(own))}."
        )
    check_shapes(own, given, question)


def check_shapes(
    own: Mapping[str, torch.Size], given: Mapping[str, Tensor], question: str, rows: int = 0
) -> None:
    """Refuse leaves of other shapes: as many numbers in another order would be taken for them.

    Args:
        own: The shape of every leaf of a row.
        given: Some of the leaves.
        question: Who asks.
        rows: The leading axis that all leaves have in addition; 0 for none.
    """
    for name, leaf in given.items():
        found = leaf.shape if isinstance(leaf, Tensor) else type(leaf).__name__
        expected = (rows, *own[name]) if rows else tuple(own[name])
        if found != expected:
            each = ", one set of parameters per row," if rows else ""
            raise ValueError(
                f"Expected {name!r} of shape {expected}{each} in `{question}`, found "
                f"{tuple(found) if isinstance(leaf, Tensor) else found}. Give tensors of the "
                "parameters' shapes, not transposed or flattened."
            )


def scale_rows(values: Tensor, factors: Tensor | None) -> Tensor:
    """``factors`` (M,) times ``values`` (M, ...), exactly 0 where the factor is 0."""
    if factors is None:
        return values
    factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    # In half precision small factors would round to 0 before they meet large values.
    wide = _tree.at_least_float32(values)
    return torch.where(factors == 0, 0.0, factors.to(wide.dtype) * wide).to(values.dtype)


def first_rows(per_row: Any, count: int) -> Any:
    """The first rows of every tensor of a tree; None stays None."""
    return _tree.tree_map(lambda leaf: leaf if leaf is None else leaf[:count], per_row)
