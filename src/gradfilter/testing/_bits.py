"""What a law asks: trees compared as bits, so that −0.0 is not 0.0 and NaN equals itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree

AS_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def ensure(holds: Any, otherwise: str) -> None:
    """Raise AssertionError, also where ``python -O`` takes assert statements out."""
    if not holds:
        raise AssertionError(otherwise)


def ensure_tensors(tree: Any) -> None:
    """Refuse leaves that are something else."""
    for name, leaf in _tree.flatten_with_names(tree)[0].items():
        ensure(
            isinstance(leaf, Tensor),
            f"expected tensors only, found {name!r} of type {type(leaf).__name__}. Keep numbers in "
            "states and metrics as tensors of shape (), and write {} for no state",
        )


def copied(tree: Any) -> Any:
    """The tree in storage of its own, so that what is written later does not reach it."""
    ensure_tensors(tree)
    return _tree.tree_map(torch.clone, tree)


def bits(tree: Any) -> dict[str, Tensor]:
    """Copies of the leaves as integers, under their dotted names."""
    named = _tree.flatten_with_names(copied(tree))[0]
    real = {n: torch.view_as_real(t) if t.is_complex() else t for n, t in named.items()}
    return {n: t.contiguous().view(AS_INTEGER[t.element_size()]) for n, t in real.items()}


def assert_same_bits(found: Any, expected: Any, what: str) -> None:
    """Refuse trees that differ in a name, a shape or a bit; ``what`` ends the error."""
    got, want = bits(found), bits(expected)
    ensure(list(got) == list(want), f"leaves {sorted(set(got) ^ set(want))} come and go {what}")
    differ = [name for name in want if not torch.equal(got[name], want[name])]
    ensure(not differ, f"{differ} differ {what}")


def planted(tree: Any) -> Any:
    """The tree with −0.0 and NaN in every floating leaf."""

    def plant(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        leaf = leaf.clone().contiguous()
        leaf.view(-1)[-1] = torch.nan
        leaf.view(-1)[0] = -0.0
        return leaf

    ensure_tensors(tree)
    return _tree.tree_map(plant, tree)
