"""Clipping unit by unit where parameters are sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradfilter._shards import cuts, local, parts, resharded
from gradfilter._types import Params, Tree
from gradfilter.transforms._units import UnitDims, within_units


def clip_shards(
    clip: Callable[..., tuple[Tree, Tensor]],
    grads: Tree,
    params: Params,
    unit_dims: UnitDims | None,
) -> tuple[Tree, Tensor]:
    """Clip the local shards; units that lie on several ranks by their norm over all of them.

    Args:
        clip: ``clip(grads, params, summed=...)`` gives clipped leaves of one dtype, and which
            units it scaled down.
        grads: DTensors, some of them at least.
        params: Sharded like the gradients.
        unit_dims: As for `agc_clip`.

    Returns:
        The clipped gradients, sharded as before, and the part of all units that was scaled down.
    """
    # Along which dims of the mesh the units of a leaf lie on several ranks.
    apart = {
        name: tuple(where for where, dim in cuts(grads[name]).items() if dim in dims)
        for name, dims in within_units(grads, unit_dims).items()
    }
    clipped: Tree = {}
    counts = []
    for part in parts(grads):
        kinds = {(apart[name], leaf.dtype) for name, leaf in part.leaves.items()}
        for over, dtype in sorted(kinds, key=str):
            some = {
                name: leaf
                for name, leaf in part.leaves.items()
                if (apart[name], leaf.dtype) == (over, dtype)
            }
            weights = {name: local(params[name]) for name in some}
            summed = partial(part.summed, over=over) if over else None
            scaled, fewer = clip(some, weights, summed=summed)
            clipped |= {name: resharded(leaf, grads[name]) for name, leaf in scaled.items()}
            count = torch.stack([fewer.sum(), torch.ones_like(fewer).sum()])
            # A unit that lies on several ranks was counted by each of them.
            counts.append(part.summed(count, over=set(cuts(part.like)) - set(over)))
    shrunk, units = torch.stack(counts).sum(0).to(torch.float32).unbind()
    return clipped, shrunk / units
