"""Send rows, or their sum, to other ranks while the backward pass still computes other leaves.

A bucket of leaves leaves as soon as all of them are there. The buckets have one order on all ranks,
that in which a backward pass usually completes leaves: the last ones of the module first. A leaf
without a gradient is there at the end of the pass, and the buckets behind it wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from gradfilter._types import Tree
from gradfilter.distributed._ranks import (
    Arrived,
    Bucket,
    Flight,
    Ranks,
    arrived_buckets,
    arrived_leaves,
    bucketed,
    parcels,
    side_by_side,
)
from gradfilter.grads._stack import GradStack
from gradfilter.grads.fused._along import held
from gradfilter.grads.fused._factors import Factor
from gradfilter.grads.fused._fused_stack import FusedStack

T = TypeVar("T")


def last_first(tree: Mapping[str, T]) -> dict[str, T]:
    """Return a tree with its leaves in the order in which they leave, early or not."""
    return {name: tree[name] for name in reversed([*tree])}


class Departures:
    """Starts the collective of each bucket when its last leaf is there.

    Args:
        shapes: The shapes of one row's leaves, in order.
        dtypes: Their dtypes.
        start: Starts the collective of a bucket (M, n), whose memory it may overwrite.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
        start: Callable[[Tensor], Arrived],
    ) -> None:
        leaves = {name: (shape, dtypes[name]) for name, shape in last_first(shapes).items()}
        self._dtypes, self._start = dtypes, start
        self._left = deque(bucketed(leaves))
        self._waiting: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self.flights: list[Flight] = []
        self.is_right = True
        """False if a leaf came twice: a pass was refused after some buckets had left."""

    def add(self, name: str, rows: Tensor) -> None:
        """Take a leaf (M, *shape), and send the buckets that are complete."""
        self.is_right &= name not in self._seen
        self._seen.add(name)
        self._waiting[name] = rows.to(self._dtypes[name]).reshape(len(rows), -1)
        while self._left and self._left[0].keys() <= self._waiting.keys():
            shapes = self._left.popleft()
            leaves = [self._waiting.pop(name) for name in shapes]
            # A copy, because the pass may still read a leaf, which the collective overwrites.
            flat = leaves[0].clone() if len(leaves) == 1 else side_by_side(leaves)
            self.flights.append((shapes, self._start(flat)))

    def is_right_everywhere(self, ranks: Ranks) -> bool:
        """Return whether no rank has sent a leaf of a pass that was refused, alike on all ranks."""
        return not ranks.on_any(lambda: not self.is_right)()


def departures_of(stack: FusedStack, start: Callable[[Tensor], Arrived]) -> Departures:
    """Return the departures of the leaves of a stack."""
    params = held(stack.origin.params)
    dtypes = {name: params[name].dtype for name in stack.shapes}
    return Departures(stack.shapes, dtypes, start)


def exchanged_early(stack: FusedStack, ranks: Ranks) -> list[Bucket] | None:
    """Send every rank its shard of the local rows, as `exchanged` does, during the backward pass.

    Returns:
        None, on all ranks, if the pass of one of them was refused.
    """
    leaving = departures_of(stack, lambda flat: ranks.exchange(parcels(flat, ranks.size)))

    def send(factor: Factor, name: str) -> Tensor:
        leaving.add(name, factor.rows())
        return torch.empty(0)  # the rows are on their way

    stack.each(send)
    found = list(arrived_buckets(leaving.flights))
    return found if leaving.is_right_everywhere(ranks) else None


def added_up_early(stack: FusedStack, weights: Tensor, ranks: Ranks) -> Tree | None:
    """Sum weighted rows over the ranks, with equal bits on each, during the backward pass.

    Args:
        stack: The local rows.
        weights: Their weights. (M,)
        ranks: The ranks that take part.

    Returns:
        None, on all ranks, if the pass of one of them was refused.
    """
    leaving = departures_of(stack, lambda flat: ranks.start_total(flat[0]))

    def send(name: str, total: Tensor) -> Tensor:
        leaving.add(name, total[None])
        return total.new_empty(0)

    stack.combine_into(weights, send)
    found = arrived_leaves(leaving.flights)
    if not leaving.is_right_everywhere(ranks):
        return None
    return {name: found[name] for name in stack.shapes}


def can_leave_early(stack: GradStack) -> bool:
    """Return whether it is of use to send leaves of a stack before the others are computed.

    On CPUs it is not: the collectives take the cores of the backward pass, and buckets are copied
    (measured by ``python -m benchmarks._departures``).
    """
    return isinstance(stack, FusedStack) and not stack.groups and stack.device.type != "cpu"
