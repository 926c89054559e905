"""The stack whose rows are on different ranks, and `across_ranks`, the transform that makes it.

All ranks check first that they hold the same leaves, the same number of rows, the same parameters
and the same chain: a rank that differs would otherwise block the others for ever.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.distributed._ranks import Bucket, Ranks, added_up, combined, exchanged
from gradfilter.grads._stack import (
    GRAM_UP_TO,
    BaseStack,
    DenseStack,
    GradStack,
    as_stack,
    check_per_row,
    check_same_leaves,
    check_shapes,
    copied,
    scale_rows,
)
from gradfilter.grads.fused._lift import untraced
from gradfilter.transforms._fingerprint import described, shortened, whole_chain
from gradfilter.transforms._transform import transform

# --- The rows of all ranks, before they are cut or scaled ---


def per_row(stack: GradStack, keep: Tensor | bool = True) -> Tensor:
    """Whether rows take part, their losses if known, and whether their rank skips. (3, M)."""
    live = stack.live.to(_tree.wide(stack.live))
    losses = live if stack.losses is None else stack.losses.detach().to(live.dtype)
    return torch.stack(
        [live, losses, _tree.as_bool_tensor(keep, live.device).to(live.dtype).expand_as(live)]
    )


@dataclass(eq=False)
class GatheredRows:
    """W times M rows, M of them here. All methods but `mine` are collectives.

    Attributes:
        local: The M rows of this rank.
        ranks: Where the rows are.
        numbers: What `per_row` says on every rank, gathered at once: later only some ranks may ask.
            (W, 3, M)
    """

    local: GradStack
    ranks: Ranks
    numbers: Tensor
    _gram: Tensor | None = None
    _buckets: list[Bucket] | None = None

    @property
    def live(self) -> Tensor:
        """Which rows take part, rank-major. (M·W,) bool."""
        return self.numbers[:, 0].flatten() != 0

    @property
    def losses(self) -> Tensor | None:
        """Of all rows, if they are known. (M·W,)."""
        if self.local.losses is None:
            return None
        return self.numbers[:, 1].flatten().to(self.local.losses.dtype)

    @property
    def keep(self) -> Tensor:
        """Whether no rank skips the step. () bool."""
        return (self.numbers[:, 2] != 0).all()

    def __len__(self) -> int:
        """M·W."""
        return len(self.local) * self.ranks.size

    def mine(self, per_row: Tensor) -> Tensor:
        """This rank's part of a tensor with one entry per row. (M, ...)."""
        start = len(self.local) * self.ranks.rank
        return per_row[start : start + len(self.local)]

    def columns(self, names: Collection[str]) -> GatheredRows:
        """The same rows on some of the leaves."""
        return GatheredRows(self.local.columns(names), self.ranks, self.numbers)

    @property
    def is_exchanged(self) -> bool:
        """Whether every rank holds a shard of all rows, or their Gram."""
        return self._gram is not None

    def gram(self) -> Tensor:
        """J Jᵀ, the same bits on every rank. (M·W, M·W)."""
        if self._gram is None:
            buckets, parts = [], []
            for bucket in exchanged(self.local.stacked(), self.ranks):
                parts.append(_products.inner(bucket.shard, bucket.shard))
                buckets.append(bucket)
            self._buckets = buckets
            self._gram = self.ranks.total(torch.stack(parts).sum(0))
        return self._gram.clone()  # the caller's, who may write to it

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J for weights (M·W,), the same bits on every rank."""
        weights = weights.detach()
        if self._buckets is not None:
            buckets = self._buckets
            if len(self.local) == 1:
                self._buckets = None  # their memory will hold the sum
            return combined(buckets, weights, self.ranks)
        # Without shards of all rows, the sum of the local ones is all that has to travel.
        return added_up(self.local.combine(self.mine(weights)), self.ranks)

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M·W,)."""
        return self.ranks.gather(self.local.dot(tree)).flatten()

    def sq_norms(self) -> Tensor:
        """diag(J Jᵀ). (M·W,)."""
        if self._gram is not None:
            return self._gram.diagonal().clone()
        return self.ranks.gather(self.local.sq_norms()).flatten()

    def stacked(self) -> Tree:
        """All rows, on every rank. (M·W, *shape)."""
        return {n: self.ranks.gather(g).flatten(0, 1) for n, g in self.local.stacked().items()}

    def release(self) -> None:
        """Let go of the shards, and of what the local rows were computed from."""
        self._buckets = None
        self.local.release()


# --- Check that all ranks hold the same leaves and the same number of rows ---


ROWS = 32
"""Rows per rank of which a message between CPUs also brings what there is one number of."""


def validate_ranks(
    stack: GradStack, ranks: Ranks, keep: Tensor | bool | None = None
) -> GatheredRows:
    """The rows of all ranks, once every rank knows that they are rows of one matrix.

    Args:
        stack: The local rows.
        ranks: Who gives some.
        keep: False where this rank would skip the step; None if nobody asks.

    Raises:
        ValueError: Number of rows, leaves, their order, shapes or dtypes differ; it names two
            ranks and the difference.
    """
    text, own = _described(stack, keep is not None), per_row(stack, True if keep is None else keep)
    few = own.device.type == "cpu" and len(stack) <= ROWS
    # Of one length whatever there is to say, or ranks that differ could not even compare.
    message = torch.zeros(3 + 3 * ROWS, dtype=torch.int64)
    message[:3] = torch.tensor([len(stack), _digest(text), len(text)])
    if few:
        message[3 : 3 + own.numel()] = own.flatten().view(torch.int64)
    messages = ranks.gather_on_host(message)
    _check_alike(messages[:, :3].tolist(), text, ranks)
    if not few:
        return GatheredRows(stack, ranks, ranks.gather(own))
    numbers = messages[:, 3 : 3 + own.numel()].contiguous().view(own.dtype)
    return GatheredRows(stack, ranks, numbers.reshape(-1, *own.shape))


def check_leaves_alike(params: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Refuse, on every rank, parameters whose names, order, shapes or dtypes differ between ranks.

    Raises:
        ValueError: They do; it names two ranks and the difference.
    """
    text = _described(DenseStack({name: p.detach()[None] for name, p in params.items()}), False)
    note = torch.tensor([1, _digest(text), len(text)])
    _check_alike(ranks.gather_on_host(note).tolist(), text, ranks)


def _digest(text: bytes) -> int:
    return int.from_bytes(sha256(text).digest()[:8], signed=True)


def _check_alike(notes: list[list[int]], text: bytes, ranks: Ranks) -> None:
    """Compare (number of rows, digest, length of the text); all ranks read the same notes."""
    for rank, note in enumerate(notes):
        if note[0] != notes[0][0]:
            raise ValueError(
                f"RankStack: expected as many rows on every rank, found {notes[0][0]} on rank "
                f"{ranks.name(0)} and {note[0]} on rank {ranks.name(rank)}. Give all "
                "ranks batches of one size; drop_last=True in the DataLoader leaves out a last "
                "one that is smaller."
            )
    other = next((rank for rank, note in enumerate(notes) if note[1] != notes[0][1]), None)
    if other is not None:
        # Sent by all ranks, also those that agree: a gathering is of all or of none.
        longest = max(note[2] for note in notes)
        letters = ranks.gather_on_host(torch.tensor([*text.ljust(longest)], dtype=torch.uint8))
        ours, theirs = (json.loads(bytes(letters[rank].tolist())) for rank in (0, other))
        raise ValueError(
            "RankStack: expected the same leaves in the same order on every rank, found "
            f"{_leaf_difference(ours, theirs, ranks.name(0), ranks.name(other))}."
        )


def _described(stack: GradStack, keeps: bool) -> bytes:
    """Names, shapes and dtypes of the leaves in order, and what else is known of the rows."""
    tensors: Mapping[str, Tensor] = {}
    if isinstance(stack, DenseStack):
        tensors = stack.rows
    elif isinstance(stack, BaseStack) and stack.origin is not None:
        tensors = stack.origin.params
    leaves = [
        [name, list(shape), str(tensors[name].dtype) if name in tensors else "unknown"]
        for name, shape in stack.shapes.items()
    ]
    return json.dumps([*leaves, [stack.losses is not None, keeps]]).encode()


def _leaf_difference(ours: list[Any], theirs: list[Any], one: int, other: int) -> str:
    """The first thing in which two ranks differ, and what to do about it, in words."""
    advice = "Build the same model, with the same frozen parameters, on all ranks"
    *ours, known_here = ours
    *theirs, known_there = theirs
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            here, there = (f"{_words(a)} on rank {one}", f"{_words(b)} on rank {other}")
            return f"leaf {place} is {here} and {there}. {advice}"
    if len(ours) != len(theirs):
        return f"{len(ours)} leaves on rank {one} and {len(theirs)} on rank {other}. {advice}"
    what = 0 if known_here[0] != known_there[0] else 1
    here, there = ("known" if known[what] else "unknown" for known in (known_here, known_there))
    found = f"{('losses', 'keep')[what]} {here} on rank {one} and {there} on rank {other}"
    return f"{found}. Give them on all ranks or on none"


def _words(leaf: list[Any]) -> str:
    name, shape, dtype = leaf
    return f"{name!r} of shape {shape} and dtype {dtype}"


# --- The stack ---


FEW = 2
"""Local rows up to which exchanging them sends less than the two sums of a rule without Gram."""


@copied("losses", "scale")
class RankStack(BaseStack):
    r"""Rows that live on different ranks, as one stack: row r·M + m is row m of rank r.

    Every rank gives its own M rows and asks the same questions in the same order; all get the same
    answers, bit for bit, and so take the same decisions. Links need not know.

    ``gram`` sends every rank one shard of the local rows, takes a Gram there, and adds up the
    (M·W)² numbers; ``combine`` then sums on the shard and gathers. Of P parameters a rank sends

        gram:                   M·P (W − 1)/W numbers
        combine after a gram:     P (W − 1)/W
        combine without one:    2·P (W − 1)/W
        dot, sq_norms:          M to every other rank

    For M = 1 a gram and a combination are what one ring all-reduce sends. `consensus_filter` takes
    that way up to M = 2, else two combinations without a gram. ``stacked``, and so a
    `sam_perturb` per microbatch, brings all rows to all ranks: see `across_ranks` for better.

    Making a stack compares rows and leaves of all ranks, by a short message between CPUs, and
    gathers the losses. ``buffers`` and ``aux`` are the local ones: BatchNorm keeps statistics per
    rank, as in DistributedDataParallel without SyncBatchNorm.

    Args:
        stack: The local rows: a GradStack or a plain stacked dict, M as large on every rank.
        group: The process group; None for all processes.
        keep: False where this rank would skip the step, () bool; None if nobody asks.

    Attributes:
        keep: Whether no rank would skip the step, the same on all. () bool.

    Raises:
        ValueError: Rows, leaves, shapes or dtypes differ between ranks; raised on all of them.
        RuntimeError: There is no process group; at any question, another rank is gone.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from gradfilter.distributed import RankStack
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rows = RankStack({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        stack: GradStack | Tree,
        group: dist.ProcessGroup | None = None,
        *,
        keep: Tensor | bool | None = None,
    ) -> None:
        local, ranks = as_stack(stack), Ranks.of(group)
        self._view(validate_ranks(local, ranks, keep), None, len(local) * ranks.size)

    def _view(self, spread: GatheredRows, scale: Tensor | None, count: int) -> Self:
        """The first ``count`` of the rows, scaled."""
        self._spread, self.scale, self._count = spread, scale, count
        self.origin = None
        losses = spread.losses
        self.losses = None if losses is None else losses[:count]
        self.keep = spread.keep
        self.buffers, self.aux = spread.local.buffers, spread.local.aux
        return self

    def _like_this(self, spread: GatheredRows, scale: Tensor | None, count: int) -> Self:
        return self.__new__(type(self))._view(spread, scale, count)

    def _scaled(self, scale: Tensor) -> Self:
        return self._like_this(self._spread, scale, self._count)

    def _columns(self, names: Collection[str]) -> Self:
        return self._like_this(self._spread.columns(names), self.scale, self._count)

    def _first(self, count: int) -> Self:
        scale = None if self.scale is None else self.scale[:count]
        return self._like_this(self._spread, scale, count)

    def __len__(self) -> int:
        """The number of rows on all ranks together, M·W."""
        return self._count

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return self._spread.local.shapes

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._spread.numbers.device

    @property
    def live(self) -> Tensor:
        """Which rows take part. (M·W,) bool."""
        live = self._spread.live[: self._count]
        return live if self.scale is None else live & (self.scale != 0)

    def gram_is_cheap(self) -> bool:
        """Whether the rows are exchanged already, or that sends less than two combinations."""
        few = len(self._spread.local) <= FEW and len(self) <= GRAM_UP_TO
        return few or self._spread.is_exchanged

    def gram(self) -> Tensor:
        """K = J Jᵀ. (M·W, M·W)."""
        gram = scale_rows(self._spread.gram()[: self._count, : self._count], self.scale)
        return scale_rows(gram.T, self.scale).T

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J for ``weights`` (M·W,), the same on every rank."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        cut_off = weights.new_zeros(len(self._spread) - len(self))
        return self._spread.combine(torch.cat([weights, cut_off]))

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v for a tree v that is the same on every rank. (M·W,)."""
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(self._spread.dot(tree)[: self._count], self.scale)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M·W,)."""
        norms = scale_rows(self._spread.sq_norms()[: self._count], self.scale)
        return scale_rows(norms, self.scale)

    def stacked(self) -> Tree:
        """All rows on every rank, leaf by leaf. (M·W, *shape)."""
        rows = self._spread.stacked().items()
        return {name: scale_rows(leaf[: self._count], self.scale) for name, leaf in rows}

    def at(self, params: Params) -> GradStack:
        """The same rows at other parameters, which are the same on every rank."""
        return self._again(self._spread.local.at(params))

    def at_rows(self, params: Tree) -> GradStack:
        """The same rows, row r·M + m at its own parameters. Leaves are (M·W, *shape)."""
        unknown = sorted(set(params) - set(self.shapes))
        if unknown:
            raise ValueError(
                f"Expected parameters among {sorted(self.shapes)}, found unknown {unknown}."
            )
        check_shapes(self.shapes, params, "at_rows", rows=len(self))
        own = {}
        for name, leaf in params.items():
            # Rows that `first` cut off are computed somewhere, too, so that every rank has M.
            rest = leaf[:1].expand(len(self._spread) - len(self), *leaf.shape[1:])
            own[name] = self._spread.mine(torch.cat([leaf, rest]))
        return self._again(self._spread.local.at_rows(own))

    def _again(self, local: GradStack) -> GradStack:
        ranks = self._spread.ranks
        spread = GatheredRows(local, ranks, ranks.gather(per_row(local)))
        return self._like_this(spread, self.scale, self._count)

    def explain(self) -> str:
        """Return how the rows of this rank are computed and held."""
        return f"{self!r}, of which this rank holds: {self._spread.local.explain()}"

    def release(self) -> None:
        """Let go of whatever can be computed, or exchanged, again."""
        self._spread.release()


# --- Check that all ranks start with the same parameters and the same chain ---


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_start(params: Params, ranks: Ranks) -> None:
    """Refuse, on every rank, parameters that differ between ranks.

    Compared are the sums of their bits, as integers: equal parameters always pass.

    Args:
        params: This rank's.
        ranks: Who starts together.

    Raises:
        ValueError: Leaves or values differ; it names two ranks and a leaf.
    """
    check_leaves_alike(params, ranks)
    sums = torch.stack([_bits(p) for p in params.values()]).cpu()
    found = ranks.gather_on_host(sums)
    for rank, other in enumerate(found):
        for name, same in zip(params, (other == found[0]).tolist(), strict=True):
            if not same:
                raise ValueError(
                    f"across_ranks: expected the same parameters on every rank, found other values "
                    f"of {name!r} on rank {ranks.name(0)} than on rank {ranks.name(rank)}. Wrap "
                    "the model in DistributedDataParallel, which copies those of the first rank "
                    "to all, or seed all ranks alike before the model is made."
                )


def check_same_chain(chain: Transform | None, ranks: Ranks) -> None:
    """Refuse, on every rank, chains or hyperparameters that differ between ranks.

    Compared is what stands from `across_ranks` on, which has to do the same everywhere. What
    stands before it works on the rows of one rank.

    Args:
        chain: The outermost one, or None where `across_ranks` was not made part of one.
        ranks: Who starts together.

    Raises:
        ValueError: They differ; it names two ranks and what is different.
    """
    links = () if chain is None else chain.links
    names = [part.name for part in links]
    links = links[names.index("across_ranks") :] if "across_ranks" in names else links
    own = [described(part) for part in links]
    others = ranks.gather_texts(json.dumps(own))
    for rank, text in enumerate(others):
        if text != others[0]:
            raise ValueError(
                f"across_ranks: expected the same chain on every rank, found "
                f"{_chain_difference(json.loads(others[0]), json.loads(text), ranks, rank)}. Build "
                "it from the same numbers on all ranks; what differs on purpose belongs before "
                "across_ranks()."
            )


def _chain_difference(ours: list[str], theirs: list[str], ranks: Ranks, rank: int) -> str:
    """The first transform in which two ranks differ, in words."""
    one, other = f"on rank {ranks.name(0)}", f"on rank {ranks.name(rank)}"
    pairs = zip_longest(ours, theirs, fillvalue="nothing")
    a, b = next((shortened(a), shortened(b)) for a, b in pairs if a != b)
    if a == b:
        return f"{a} {one} with other functions than {other}"
    return f"{a} {one} and {b} {other}"


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, which no rounding touches. ()."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)


# --- The transform ---


@remembered
def across_ranks(group: dist.ProcessGroup | None = None) -> Transform:
    """From here on the chain sees the rows of all ranks: `RankStack` as a link.

    What stands before it happens on every rank by itself, what stands after it is the same on all.
    Its place in a chain is therefore a choice::

        chain(across_ranks(), agree_filter(t), sam_perturb(r), sgd(lr))  # one perturbation for all
        chain(sam_perturb(r), across_ranks(), mean_rows(), sgd(lr))      # m-sharpness: every rank
                                                       # perturbs along its own gradient, unasked
        chain(clip_per_row(c), across_ranks(), consensus_filter(), sgd(lr))

    All ranks start from the same parameters, and run the same chain from this link on: ``init``
    compares both, hyperparameters too. They then keep their parameters, to the bit. A step that
    one of them would skip, by a ``keep`` from its caller or a link before this one, all skip: put
    `finite_filter` behind this link to reject the rows of such a rank instead.

    What is computed before this link stays as it is: ``info["loss"]`` of a `train_step`, the
    ``loss`` of a `Filtered` step and metrics of earlier links are those of this rank's rows alone.
    ``value`` for a `plateau` schedule is to be the same on all ranks; `RankStack.losses` has all.

    Args:
        group: The process group; None for all processes.

    Needs: rows, as many on every rank.

    Publishes: ``keep`` () if an earlier link or the caller did; ``clean_grads``, as rows of all
    ranks, if a sam_perturb before it did.

    Raises:
        ValueError: On every rank: at ``init`` parameters, links from here on or their
            hyperparameters differ between ranks, or at a step rows.
        RuntimeError: At either: there is no process group, or another rank is gone.

    Examples:
        >>> import torch, torch.distributed as dist, gradfilter as gf
        >>> from gradfilter.distributed import across_ranks
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> update = gf.chain(across_ranks(), gf.agree_filter(0.97), gf.sgd(1.0))
        >>> params = {"w": torch.zeros(2)}
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.2]])}
        >>> update(params, update.init(params), rows)[0]
        {'w': tensor([-1.0000, -0.1000])}
        >>> dist.destroy_process_group()
    """

    def update(
        rows: GradStack, state: State, params: Params, /, **extra: Any
    ) -> tuple[GradStack, State, Out]:
        keep, clean = extra.get("keep"), extra.get("clean_grads")
        spread_out = untraced(RankStack)  # ranks talk between the graphs of torch.compile
        spread = spread_out(rows, group, keep=keep)
        out: Out = {} if keep is None else {"keep": spread.keep}
        if isinstance(clean, GradStack):
            out["clean_grads"] = spread_out(clean, group)
        return spread, state, out

    def init(params: Params) -> State:
        ranks = Ranks.of(group)
        check_same_start(params, ranks)
        check_same_chain(whole_chain(), ranks)
        return {}

    return transform("across_ranks", "rows -> rows", update, init=init)
