"""A gradient tree times a factor for every leaf, which is multiplied when it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._readable import transformed
from gradfilter._shards import is_sharded
from gradfilter._types import Out, Tree


@dataclass(frozen=True, eq=False)
class ScaledTree:
    """The products of leaves and factors, computed for some leaves at a time.

    A clip that is followed by an update rule need not write all scaled gradients to memory, from
    which the rule would read them again: the rule reads some leaves, while they are in the cache.
    Every leaf has to be read once.

    Attributes:
        leaves: The gradient.
        factors: Returns the factors of those of some leaves that are scaled, in shapes that
            broadcast to the leaves, and in their dtypes or in float32 for half precision.
        published: Returns what the clip publishes, after all leaves have been read.
    """

    leaves: Tree
    factors: Callable[[Collection[str]], Tree]
    published: Callable[[], Out] = dict

    def read(self, names: Collection[str]) -> Tree:
        """Return the products of some leaves, in the dtypes of the leaves."""
        return {name: leaf.to(self.leaves[name].dtype) for name, leaf in self.wide(names).items()}

    def wide(self, names: Collection[str]) -> Tree:
        """Return the products of some leaves; those in half precision are in float32."""
        return scaled({name: self.leaves[name] for name in names}, self.factors(names))


def scaled(leaves: Tree, factors: Tree) -> Tree:
    """Multiply the leaves that have a factor, in float32 or wider.

    In half precision a small factor would round to 0 before the product.
    """
    wide = [_tree.at_least_float32(leaves[name]) for name in factors]
    if not wide:
        return leaves
    # A factor of 1 changes no bit, and costs less than torch.where per entry.
    products: Sequence[Tensor]
    # vmap and sharded leaves do not support one call for all.
    if transformed() or any(map(is_sharded, wide)):
        products = [leaf * factor for leaf, factor in zip(wide, factors.values(), strict=True)]
    else:
        products = torch._foreach_mul(wide, list(factors.values()))  # pyright: ignore[reportPrivateImportUsage]  # as torch's clipping
    return leaves | dict(zip(factors, products, strict=True))
