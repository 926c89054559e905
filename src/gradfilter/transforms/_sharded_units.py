"""Clipping unit by unit where parameters are sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradfilter._shards import local, parts, resharded, sharded_dims
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
    within = within_units(grads, unit_dims)
    split = {name for name, dims in within.items() if sharded_dims(grads[name]) & set(dims)}
    clipped: Tree = {}
    counts = []
    for part in parts(grads):
        kinds = {(name in split, leaf.dtype) for name, leaf in part.leaves.items()}
        for cut_up, dtype in sorted(kinds, key=str):
            some = {
                name: leaf
                for name, leaf in part.leaves.items()
                if ((name in split), leaf.dtype) == (cut_up, dtype)
            }
            weights = {name: local(params[name]) for name in some}
            scaled, fewer = clip(some, weights, summed=part.summed if cut_up else None)
            clipped |= {name: resharded(leaf, grads[name]) for name, leaf in scaled.items()}
            count = torch.stack([fewer.sum(), torch.ones_like(fewer).sum()])
            # A unit that lies on several ranks was counted by each of them.
            counts.append(count if cut_up else part.summed(count))
    shrunk, units = torch.stack(counts).sum(0).to(torch.float32).unbind()
    return clipped, shrunk / units
