"""What stacks of every kind check and do with the factors on their rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree


def check_per_row(what: str, values: Tensor, count: int) -> None:
    """Refuse anything but one number per row."""
    if values.shape != (count,):
        raise ValueError(
            f"Expected {what}s of shape ({count},), found {tuple(values.shape)}. Give one {what} "
            "per row."
        )


def check_same_leaves(own: Collection[str], given: Mapping[str, Tensor], question: str) -> None:
    """Refuse a tree whose leaves are not those of the rows."""
    if set(own) != set(given):
        raise ValueError(
            f"Expected the leaves {sorted(own)} in `{question}`, missing "
            f"{sorted(set(own) - set(given))}, extra {sorted(set(given) - set(own))}."
        )


def scale_rows(values: Tensor, factors: Tensor | None) -> Tensor:
    """``factors`` (M,) times ``values`` (M, ...), exactly 0 where the factor is 0."""
    if factors is None:
        return values
    factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(factors == 0, 0.0, factors.to(values.dtype) * values).to(values.dtype)


def first_rows(per_row: Any, count: int) -> Any:
    """The first rows of every tensor of a tree; None stays None."""
    return _tree.tree_map(lambda leaf: leaf if leaf is None else leaf[:count], per_row)
