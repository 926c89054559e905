"""The units of weights, the rows and filters that adaptive clipping looks at one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from gradfilter._readable import transformed
from gradfilter._types import Tree

UnitDims = Callable[[str], "int | tuple[int, ...] | None"]
Within = dict[str, list[int]]
"""Per leaf, the dims inside a unit: those to take a norm over."""


def within_units(tree: Tree, unit_dims: UnitDims | None) -> Within:
    """The dims inside the units of every leaf; leaves that are one unit come last."""
    within = {name: _within(name, leaf.ndim, unit_dims) for name, leaf in tree.items()}
    return dict(sorted(within.items(), key=lambda item: len(item[1]) == tree[item[0]].ndim))


def _within(name: str, ndim: int, unit_dims: UnitDims | None) -> list[int]:
    dims = None if unit_dims is None else unit_dims(name)
    if dims is None:
        return list(range(1 if ndim >= 2 else 0, ndim))
    dims = (dims,) if isinstance(dims, int) else dims
    if any(not -ndim <= d < ndim for d in dims):
        raise ValueError(
            f"agc_clip: expected unit_dims within the {ndim} dims of {name!r}, found {dims}."
        )
    return [d for d in range(ndim) if d not in {d % ndim for d in dims}]


def unit_norms(
    tree: Tree, within: Within, summed: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The 2-norms of all units of all those leaves in one row, in float32 or wider. (units,).

    Args:
        tree: Has those leaves.
        within: The dims to take norms over.
        summed: Finishes sums of squares over parts of a unit that other ranks hold.
    """
    dtypes = (tree[name].dtype for name in within)
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    norms = [
        _norms(tree[name], dims, dtype)
        for name, dims in within.items()
        if len(dims) < tree[name].ndim
    ]
    whole = [tree[name] for name in list(within)[len(norms) :]]
    if whole and transformed():  # vmap knows no call for all
        norms += [torch.linalg.vector_norm(leaf, dtype=dtype).reshape(1) for leaf in whole]
    elif whole:  # networks have many of them, and small: one call for all
        norms.append(torch.stack(torch._foreach_norm(whole, 2, dtype)))
    own = torch.cat(norms)
    return own if summed is None else summed(own.square()).sqrt()


def _norms(tensor: Tensor, within: list[int], dtype: torch.dtype) -> Tensor:
    if not within:  # over nothing
        return tensor.to(dtype).abs().reshape(-1)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=within, dtype=dtype)
    return norms.reshape(-1)


def per_leaf(units: Tensor, tree: Tree, within: Within) -> list[Tensor]:
    """One number per unit, as tensors that broadcast to the leaves in the order of ``within``."""
    shapes = [
        [1 if d in dims else n for d, n in enumerate(tree[name].shape)]
        for name, dims in within.items()
    ]
    parts = torch.split(units, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
