"""The ranks of a process group: its collectives, and the exchange of rows for shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gradfilter import _products
from gradfilter._lost_ranks import explained
from gradfilter._readable import readable
from gradfilter._types import Tree
from gradfilter.grads._call_context import surroundings
from gradfilter.grads._stack import reduce_pieces

# --- The ranks and their collectives ---


LONG = 2**15
"""The numbers per rank from which a copy costs more than starting several collectives."""


# Since torch 2.13 the old name warns on every call and rank; 2.11 and 2.12 have only that name.
_NEW = hasattr(dist, "all_gather_single")
_all_gather_single: Callable[..., dist.Work | None] = getattr(
    dist, "all_gather_single" if _NEW else "all_gather_into_tensor"
)
_reduce_scatter_single: Callable[..., dist.Work | None] = getattr(
    dist, "reduce_scatter_single" if _NEW else "reduce_scatter_tensor"
)


collectives: Any = torch.ops._c10d_functional
"""Collectives that can be operations of a graph: they return new tensors, and are waited for."""


@dataclass(frozen=True)
class Ranks:
    """A process group as one of its members sees it, or a process alone.

    Every method is a collective unless it says otherwise: all ranks call it, in the same order. A
    process alone answers with its own tensors.

    Attributes:
        group: The process group; None for a process alone.
        rank: This process's place in the group.
        size: The number of ranks, W.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints; not a collective."""
        return self.rank == 0

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Ranks:
        """Return the ranks of a group; None means all processes.

        Raises:
            RuntimeError: There is no process group, or this process is not in it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "Expected a process group, found none. Call "
                "torch.distributed.init_process_group() first, in processes started by torchrun."
            )
        found = dist.group.WORLD if group is None else group
        rank = dist.get_rank(found) if isinstance(found, dist.ProcessGroup) else -1
        if rank < 0 or not isinstance(found, dist.ProcessGroup):
            raise RuntimeError(
                f"Expected a process group that rank {dist.get_rank()} is a member of, found "
                "another one. Only members may call this."
            )
        return Ranks(found, rank, dist.get_world_size(found))

    def name(self, place: int) -> int:
        """Return the global rank of the member at a place in the group; not a collective."""
        return place if self.group is None else dist.get_global_rank(self.group, place)

    def exchange(self, parcels: Tensor) -> Callable[[], Tensor]:
        """Start sending parcel w to rank w. (W, *shape).

        Returns:
            A function that waits for the parcels of all ranks, rank by rank. (W, *shape)
        """
        if self.group is None:
            return lambda: parcels
        if surroundings() is not None:
            size = [len(parcels) // self.size] * self.size
            return self._in_graph(collectives.all_to_all_single, parcels, size, size)
        parts = torch.empty_like(parcels)
        doing = "exchanging gradients"
        with explained(doing, self.group):
            work = dist.all_to_all_single(parts, parcels, group=self.group, async_op=True)
        return partial(self._wait_for, doing, [work], parts)

    def start_gather(self, tensor: Tensor, into: Tensor | None = None) -> Callable[[], Tensor]:
        """Start `gather`, and wait for it when the result is called.

        Args:
            tensor: The tensor of this rank.
            into: Memory for the result, which a graph does not use. (W, *shape)
        """
        tensor = tensor.detach()  # collectives have no graph
        if self.group is not None and surroundings() is not None:
            own = tensor.contiguous()[None]
            return self._in_graph(collectives.all_gather_into_tensor, own, self.size)
        parts = tensor.new_empty(self.size, *tensor.shape) if into is None else into
        if self.group is None:
            parts.copy_(tensor[None])
            return lambda: parts
        doing = "gathering"
        if tensor.numel() > LONG and tensor.device.type == "cpu":
            with explained(doing, self.group):
                works = self._broadcasts(parts, tensor)
        else:
            own = tensor.contiguous()[None]
            with explained(doing, self.group):
                works = [_all_gather_single(parts, own, group=self.group, async_op=True)]
        return partial(self._wait_for, doing, works, parts)

    def _broadcasts(self, parts: Tensor, own: Tensor) -> list[dist.Work | None]:
        """Start a gather by broadcasts, which on CPUs takes a third of the time of gloo's own."""
        if parts[self.rank].data_ptr() != own.data_ptr():
            parts[self.rank].copy_(own)
        return [
            dist.broadcast(part, group=self.group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts)
        ]

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, rank by rank. (W, *shape)."""
        return self.start_gather(tensor)()

    def start_total(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start `total`, and wait for it when the result is called.

        The sum is in the memory of the tensor, except in a graph.
        """
        tensor = tensor.detach()
        if self.group is None:
            return lambda: tensor
        if surroundings() is not None:
            return self._in_graph(collectives.all_reduce, tensor, "sum")
        doing = "adding up"
        with explained(doing, self.group):
            work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return partial(self._wait_for, doing, [work], tensor)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, with the same bits on each."""
        return self.start_total(tensor.clone())()

    def sum_of_pieces(self, pieces: list[Tensor]) -> Tensor:
        """Return the sum over the ranks of this rank's piece of a tensor that each has cut alike.

        Args:
            pieces: One per rank; the last ones may be shorter in one dim.
        """
        first, own = pieces[0], pieces[self.rank]
        if self.group is None:
            return own
        parcels = first.new_zeros(self.size, *first.shape)
        for parcel, piece in zip(parcels, pieces, strict=True):
            parcel[tuple(map(slice, piece.shape))] = piece
        found = torch.empty_like(first)
        doing = "adding up"
        with explained(doing, self.group):
            given = parcels.flatten()
            work = _reduce_scatter_single(found.view(-1), given, group=self.group, async_op=True)
        self._wait_for(doing, [work], found)
        return found[tuple(map(slice, own.shape))].contiguous()

    def members(self) -> set[int]:
        """Return the global ranks of the members; not a collective."""
        if self.group is None:
            return {dist.get_rank()} if dist.is_initialized() else {0}
        return set(dist.get_process_group_ranks(self.group))

    def copy_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the first rank, in place."""
        if self.group is not None:
            doing = "copying"
            with explained(doing, self.group):
                work = dist.broadcast(tensor, group=self.group, group_src=0, async_op=True)
            self._wait_for(doing, [work], tensor)

    def gather_on_host(self, numbers: Tensor) -> Tensor:
        """Return a few numbers of every rank without waiting for a device. (n,) -> (W, n)."""
        if self.group is None:
            return numbers[None]
        group = _host_group(self.group)
        parts = numbers.new_empty(self.size, len(numbers))
        with explained("comparing notes", self.group):
            _all_gather_single(parts, numbers[None], group=group)
        return parts

    def gather_texts(self, text: str) -> list[str]:
        """Return the texts of all ranks, rank by rank; only digests are sent if all are equal."""
        own = text.encode()
        note = [int.from_bytes(sha256(own).digest()[:8], signed=True), len(own)]
        notes = self.gather_on_host(torch.tensor(note)).tolist()
        if all(other == notes[0] for other in notes):
            return [text] * self.size
        # Sent by all ranks, also those that agree: a gathering is of all or of none.
        letters = own.ljust(max(length for _, length in notes))
        found = self.gather_on_host(torch.tensor([*letters], dtype=torch.uint8)).tolist()
        return [
            bytes(said[:length]).decode() for said, (_, length) in zip(found, notes, strict=True)
        ]

    def first_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Return the numbers of the first rank, for decisions that all ranks must share."""
        found: list[float] = self.gather_on_host(torch.tensor(numbers).double())[0].tolist()
        return found

    def on_any(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that is True on all ranks if `asked` is True on one of them."""
        if self.group is None:
            return asked
        return lambda: bool(self.gather_on_host(torch.tensor([asked()])).any())

    def wait_for_all(self) -> None:
        """Wait until all ranks reach this call."""
        if self.group is not None:
            dist.barrier(self.group)

    def _in_graph(
        self, collective: Callable[..., Tensor], tensor: Tensor, *args: Any
    ) -> Callable[[], Tensor]:
        """Start a collective of the graph that is being traced, which computes nothing yet."""
        assert self.group is not None
        started = collective(tensor, *args, self.group.group_name)
        return partial(collectives.wait_tensor, started)

    @contextmanager
    def around_graph(self, check: Callable[[], None]) -> Iterator[None]:
        """Run a check before a graph, and explain errors of the collectives in the graph."""
        check()
        with explained("running a compiled step", self.group, among_others=True):
            yield

    def _wait_for(self, doing: str, works: Sequence[dist.Work | None], result: Tensor) -> Tensor:
        """Wait for collectives, which until then hold the tensors that they send and fill."""
        with explained(doing, self.group):
            for work in works:
                if work is not None:
                    work.wait()
        return result


ALONE = Ranks(None, 0, 1)
"""A process without others."""


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the group itself if it works between CPUs, else one of the same ranks that does."""
    if "cpu" in dist.get_backend_config(group) or dist.get_backend(group) in ("gloo", "mpi"):
        return group
    return _make_host_group(group)


@lru_cache(maxsize=16)
def _make_host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    members = dist.get_process_group_ranks(group)
    made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)  # this rank is a member
    return made


# --- Exchange rows: every rank gets one shard of all rows ---


Arrived = Callable[[], Tensor]
"""Waits for a collective, and returns its result."""

Flight = tuple[dict[str, torch.Size], Arrived]
"""A bucket whose collective has started: the shapes of one row's leaves, and its result."""

BUCKET = 2**22
"""The numbers per row that are sent together: enough to outweigh a collective's latency."""


@dataclass(frozen=True)
class Bucket:
    """Leaves of one dtype, joined along their columns.

    Attributes:
        shapes: The shapes of one row's leaves, in order.
        shard: This rank's columns of all rows, rank by rank; the last is padded with zeros. (M·W,
            s)
    """

    shapes: dict[str, torch.Size]
    shard: Tensor


def exchanged(rows: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Bucket]:
    """Send every rank its shard of the local rows: this rank sends M·P (W − 1)/W numbers.

    All buckets start at once, and each is yielded when it arrives, so that it can be used while the
    following ones are still being sent.

    Args:
        rows: The local rows, with the same leaves on every rank. (M, *shape)
        ranks: The ranks that take part.
    """
    yield from arrived_buckets(
        [(shapes, ranks.exchange(parcels(flat, ranks.size))) for shapes, flat in _flattened(rows)]
    )


def arrived_buckets(flights: Iterable[Flight]) -> Iterator[Bucket]:
    """Wait for the parcels (W, M, s) of each bucket, one after another."""
    for shapes, arrived in flights:
        yield Bucket(shapes, rearrange(arrived(), "w m s -> (w m) s"))


def arrived_leaves(flights: Iterable[Flight]) -> Tree:
    """Wait for one row (n,) of each bucket, and cut it into leaves."""
    return {n: leaf for shapes, arrived in flights for n, leaf in _leaves(shapes, arrived())}


def combined(buckets: Iterable[Bucket], weights: Tensor, ranks: Ranks) -> Tree:
    """Compute the weighted sum of all rows, equal bits on all ranks; sends P (W − 1)/W numbers.

    If M = 1, the sum overwrites the shards, because new memory would cost a CPU more than the sum
    itself.

    Args:
        buckets: The shards of all rows.
        weights: (M·W,); a row of weight 0 is masked.
        ranks: The ranks that take part.
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
    return arrived_leaves(flights)


def reduced(buckets: Iterable[Bucket], function: Callable[[Tensor], Tensor], ranks: Ranks) -> Tree:
    """Reduce all rows column by column, equal bits on all ranks; sends P (W − 1)/W numbers.

    Args:
        buckets: The shards of all rows, which stay as they are.
        function: (M·W, n) -> (n,), of every column alone.
        ranks: The ranks that take part.
    """
    flights = []
    for bucket in buckets:
        part = reduce_pieces(function, bucket.shard)  # (s,)
        flights.append((bucket.shapes, ranks.start_gather(part)))
    return arrived_leaves(flights)


def added_up(tree: Tree, ranks: Ranks) -> Tree:
    """Sum a tree over the ranks, with equal bits on each; sends 2 P (W − 1)/W numbers.

    Args:
        tree: The local part; large leaves are overwritten.
        ranks: The ranks that take part.
    """
    flights = []
    for shapes, flat in _flattened({name: leaf[None] for name, leaf in tree.items()}):
        flights.append((shapes, ranks.start_total(flat[0].contiguous())))
    return arrived_leaves(flights)


def _summed_into(shard: Tensor, weights: Tensor, place: int) -> Tensor:
    """Compute the weighted sum of the rows, in the memory of one of them if possible. (s,)."""
    own = shard[place]
    if surroundings() is not None:  # a graph gathers into new memory
        return _products.weighted_sum(weights, shard).to(shard.dtype)
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
    """Yield the leaves that `_flattened` joined, without the padding."""
    sizes = [shape.numel() for shape in shapes.values()]
    pieces = torch.split(flat.flatten()[: sum(sizes)], sizes)
    for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
        yield name, piece.view(shape)


def _flattened(rows: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, torch.Size], Tensor]]:
    """Yield matrices (M, n) of up to `BUCKET` columns or of one larger leaf, with their shapes."""
    for shapes in bucketed({name: (leaf.shape[1:], leaf.dtype) for name, leaf in rows.items()}):
        yield shapes, side_by_side([rows[name].reshape(len(rows[name]), -1) for name in shapes])


def bucketed(
    leaves: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> Iterator[dict[str, torch.Size]]:
    """Yield the shapes of leaves of one dtype, up to `BUCKET` numbers or one larger leaf."""
    found: dict[str, torch.Size] = {}
    columns, before = 0, None
    for name, (shape, dtype) in leaves.items():
        if found and (columns + shape.numel() > BUCKET or dtype != before):
            yield found
            found, columns = {}, 0
        found[name] = shape
        columns, before = columns + shape.numel(), dtype
    yield found


def side_by_side(matrices: list[Tensor]) -> Tensor:
    """Join matrices (M, n) along their columns; a single one stays as it is."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)


def parcels(flat: Tensor, size: int) -> Tensor:
    """Cut the columns of (M, n) into one parcel per rank, the last padded with zeros. (W, M, s)."""
    lacking = -flat.shape[1] % size
    padded = F.pad(flat, (0, lacking)) if lacking else flat
    return rearrange(padded, "m (w s) -> w m s", w=size).contiguous()
