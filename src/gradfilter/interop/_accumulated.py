"""The rows of one batch, and those of several as one stack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._dense import DenseStack
from gradfilter.grads._stack import GradStack


def held(rows: GradStack, factors: Tensor | None = None) -> DenseStack:
    """The rows themselves, which no longer hold activations.

    Args:
        rows: A stack that nothing has scaled yet.
        factors: (M,) to scale it with.
    """
    origin = rows.origin if isinstance(rows, AgainStack) else None
    dense = DenseStack(rows.stacked(), rows.losses, rows.buffers, rows.aux, factors, origin)
    rows.release()
    return dense


def batch_of(inputs: Any, targets: Any, criterion: Callable[..., Any] | None) -> Any:
    """The batch as `model_loss` takes it.

    Raises:
        TypeError: Targets without a criterion, or none beside inputs that are no dict.
    """
    if targets is None and not isinstance(inputs, Mapping):
        if isinstance(inputs, (tuple, list)) and len(inputs) == 2:
            raise TypeError(
                f"Expected step(inputs, targets), found one {type(inputs).__name__} of two. "
                "Unpack it: step(*batch)."
            )
        raise TypeError(
            f"Expected step(inputs, targets), or one dict, found {type(inputs).__name__} alone. "
            "Give targets, or a dict of the model's keyword arguments."
        )
    if targets is not None and criterion is None:
        raise TypeError(
            "Expected a criterion for step(inputs, targets), found None. Give Filtered a "
            "criterion, or pass one dict to a model that returns its own .loss."
        )
    return inputs if targets is None else (inputs, targets)


def joined(parts: Sequence[DenseStack]) -> DenseStack:
    """The rows of all parts, in order, computed again each on its own batch.

    Args:
        parts: Stacks on the same leaves, taken at the same parameters.

    Raises:
        ValueError: The leaves differ.
    """
    names = set(parts[0].rows)
    for part in parts[1:]:
        if set(part.rows) != names:
            raise ValueError(
                "Expected the same trainable parameters in every accumulated batch, found "
                f"{sorted(names ^ set(part.rows))} in some only. Freeze and unfreeze after step()."
            )
    sizes = [len(part) for part in parts]
    origins = [part.origin for part in parts]

    def evaluate(params: Params, per_row: bool, kept: Collection[str]) -> GradStack:
        pieces = (
            [
                dict(zip(params, cut, strict=True))
                for cut in zip(*(torch.split(leaf, sizes) for leaf in params.values()), strict=True)
            ]
            if per_row
            else [params] * len(parts)
        )
        stacks = []
        for origin, piece in zip(origins, pieces, strict=True):
            assert origin is not None  # rows of a batch always have one
            stacks.append(held(origin.evaluate(piece, per_row, kept)))
        return joined(stacks)

    first = origins[0]
    assert first is not None
    return DenseStack(
        {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
        _cat_numbers([part.losses for part in parts]),
        parts[-1].buffers,
        None if parts[0].aux is None else _tree.tree_map(_cat, *(part.aux for part in parts)),
        scale=_cat_numbers([part.scale for part in parts]),
        origin=Origin(sum(sizes), first.params, evaluate),
    )


def _cat(first: Tensor, *rest: Tensor) -> Tensor:
    """One leaf of the aux of all parts."""
    for other in rest:
        if other.shape[1:] != first.shape[1:]:
            raise ValueError(
                "Expected aux of the same shape from the rows of every accumulated batch, found "
                f"the shapes {tuple(first.shape)} and {tuple(other.shape)}. Reduce it over the "
                "samples, or accumulate batches of one size."
            )
    return torch.cat([first, *rest])


def _cat_numbers(numbers: Sequence[Tensor | None]) -> Tensor | None:
    """One number per row of every part, or None where a part has none."""
    given = [part for part in numbers if part is not None]
    return torch.cat(given) if len(given) == len(numbers) else None
