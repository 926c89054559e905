"""Rows that live on different ranks, cut across: every rank gets one shard of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gradfilter import _products
from gradfilter._readable import readable
from gradfilter._types import Tree
from gradfilter.distributed._ranks import Ranks

BUCKET = 2**22
"""Numbers per row that travel together: enough to outweigh a collective's latency."""


@dataclass(frozen=True)
class Bucket:
    """Leaves of one dtype, side by side.

    Attributes:
        shapes: Of one row's leaves, in order.
        shard: This rank's columns of all rows, rank-major; zeros fill the last shard up. (M·W, s)
    """

    shapes: dict[str, torch.Size]
    shard: Tensor


def exchanged(rows: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Bucket]:
    """Send every rank its shard of the local rows: M·P (W − 1)/W numbers leave this one.

    All buckets start at once, and each is given as it arrives: whatever is done with it then is
    done while those behind it are still on their way.

    Args:
        rows: Local rows, the same leaves on every rank. (M, *shape)
        ranks: Who takes part.
    """
    flights = [
        (shapes, ranks.exchange(_parcels(flat, ranks.size))) for shapes, flat in _flattened(rows)
    ]
    for shapes, arrived in flights:
        yield Bucket(shapes, rearrange(arrived(), "w m s -> (w m) s"))


def combined(buckets: Iterable[Bucket], weights: Tensor, ranks: Ranks) -> Tree:
    """The weighted sum of all rows, the same bits on every rank: P (W − 1)/W numbers are sent.

    Where M = 1 the sum takes the memory of the shards, whose contents are lost: fresh memory would
    cost a CPU more than the sum itself.

    Args:
        buckets: The shards of all rows.
        weights: (M·W,); a row of weight 0 is masked.
        ranks: Who takes part.
    """
    flights = []
    for bucket in buckets:
        shard = bucket.shard
        if len(shard) != ranks.size:
            part = _products.weighted_sum(weights, shard).to(shard.dtype)  # (s,)
            arrived = ranks.start_gather(part)
        else:
            arrived = ranks.start_gather(_summed_into(shard, weights, ranks.rank), into=shard)
        flights.append((bucket.shapes, arrived))
    return {n: leaf for shapes, arrived in flights for n, leaf in _leaves(shapes, arrived())}


def added_up(tree: Tree, ranks: Ranks) -> Tree:
    """The sum of a tree over the ranks, the same bits on each: 2 P (W − 1)/W numbers are sent.

    Args:
        tree: The local part; large leaves are overwritten.
        ranks: Who takes part.
    """
    flights = []
    for shapes, flat in _flattened({name: leaf[None] for name, leaf in tree.items()}):
        flights.append((shapes, ranks.start_total(flat[0].contiguous())))
    return {n: leaf for shapes, arrived in flights for n, leaf in _leaves(shapes, arrived())}


def _summed_into(shard: Tensor, weights: Tensor, place: int) -> Tensor:
    """The weighted sum of the rows, written over one of them where that saves memory. (s,)."""
    own = shard[place]
    if shard.dtype not in (torch.float32, torch.float64) or not readable(weights):
        return own.copy_(_products.weighted_sum(weights, shard))
    numbers: list[float] = weights.tolist()
    if numbers[place]:
        own.mul_(numbers[place])
    else:
        own.zero_()  # 0 · NaN is NaN
    for row, weight in enumerate(numbers):
        if weight and row != place:
            own.add_(shard[row], alpha=weight)
    return own


def _leaves(shapes: dict[str, torch.Size], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What `_flattened` put side by side, and whatever filled it up left out."""
    sizes = [shape.numel() for shape in shapes.values()]
    pieces = torch.split(flat.flatten()[: sum(sizes)], sizes)
    for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
        yield name, piece.view(shape)


def _flattened(rows: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, torch.Size], Tensor]]:
    """Matrices (M, n) of up to `BUCKET` columns, or of one larger leaf, and what they hold."""
    shapes: dict[str, torch.Size] = {}
    waiting: list[Tensor] = []
    for name, leaf in rows.items():
        matrix = leaf.reshape(len(leaf), -1)
        columns = sum(m.shape[1] for m in waiting)
        if waiting and (columns + matrix.shape[1] > BUCKET or matrix.dtype != waiting[0].dtype):
            yield shapes, _side_by_side(waiting)
            shapes, waiting = {}, []
        shapes[name] = leaf.shape[1:]
        waiting.append(matrix)
    yield shapes, _side_by_side(waiting)


def _side_by_side(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)


def _parcels(flat: Tensor, size: int) -> Tensor:
    """The columns of (M, n) in one parcel per rank, the last filled up with zeros. (W, M, s)."""
    lacking = -flat.shape[1] % size
    padded = F.pad(flat, (0, lacking)) if lacking else flat
    return rearrange(padded, "m (w s) -> w m s", w=size).contiguous()
