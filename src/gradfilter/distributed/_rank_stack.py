"""The stack whose rows are on different ranks, and `across_ranks`, the transform that makes it.

All ranks check first that they hold the same leaves, the same number of rows, the same parameters
and the same chain: a rank that differs would otherwise block the others forever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from hashlib import sha256
from itertools import zip_longest
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._shards import is_sharded
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.distributed._departures import can_leave_early
from gradfilter.distributed._gathered_rows import GatheredRows, per_row
from gradfilter.distributed._ranks import Ranks
from gradfilter.distributed._rows_over_shards import RowsOverShards
from gradfilter.grads._call_context import surroundings
from gradfilter.grads._stack import (
    GRAM_UP_TO,
    BaseStack,
    DenseStack,
    GradStack,
    StackOrigin,
    as_stack,
    check_per_row,
    check_same_leaves,
    check_shapes,
    copied,
    scale_rows,
)
from gradfilter.grads.fused._fused_stack import FusedStack
from gradfilter.grads.fused._lift import untraced
from gradfilter.transforms._fingerprint import described, shortened, whole_chain
from gradfilter.transforms._transform import transform_in_context

# --- Check that all ranks hold the same leaves and the same number of rows ---


ROWS = 32
"""The number of rows per rank up to which the first message also carries per-row numbers."""


def validate_ranks(
    stack: GradStack, ranks: Ranks, keep: Tensor | bool | None = None
) -> GatheredRows:
    """Check that the rows of all ranks form one matrix, and return them.

    Args:
        stack: The local rows.
        ranks: The ranks that hold rows.
        keep: False if this rank would skip the step; None if there is no flag.

    Raises:
        ValueError: The number of rows, the leaves, their order, shapes or dtypes differ; the error
            names two ranks and the difference.
    """
    text, own = _described(stack, keep is not None), per_row(stack, True if keep is None else keep)
    around = surroundings()
    if around is not None:  # no rank sends anything before all have traced
        check = partial(_check_rows_alike, len(stack), text, ranks)
        around.append(partial(ranks.around_graph, check))
        return _gathered(stack, ranks, ranks.gather(own))
    few = own.device.type == "cpu" and len(stack) <= ROWS
    # The message has a fixed length, because ranks that differ could not compare otherwise.
    message = torch.zeros(4 + 3 * ROWS, dtype=torch.int64)
    message[:4] = torch.tensor([len(stack), _digest(text), len(text), can_leave_early(stack)])
    if few:
        message[4 : 4 + own.numel()] = own.flatten().view(torch.int64)
    messages = ranks.gather_on_host(message)
    _check_alike(messages[:, :3].tolist(), text, ranks)
    if few:
        numbers = messages[:, 4 : 4 + own.numel()].contiguous().view(own.dtype)
        found = _gathered(stack, ranks, numbers.reshape(-1, *own.shape))
    else:
        found = _gathered(stack, ranks, ranks.gather(own))
    found.leaves_early = ranks.size > 1 and bool(messages[:, 3].all())
    return found


def _gathered(stack: GradStack, ranks: Ranks, numbers: Tensor) -> GatheredRows:
    """Return the rows of all ranks; over sharded parameters, the answers are sharded, too."""
    if isinstance(stack, FusedStack) and stack.sharded.leaves:
        return RowsOverShards(stack, ranks, numbers)
    return GatheredRows(stack, ranks, numbers)


def check_leaves_alike(params: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Refuse, on every rank, parameters whose names, order, shapes or dtypes differ between ranks.

    Raises:
        ValueError: They differ; the error names two ranks and the difference.
    """
    text = _described(DenseStack({name: p.detach()[None] for name, p in params.items()}), False)
    _check_rows_alike(1, text, ranks)


def _check_rows_alike(rows: int, text: bytes, ranks: Ranks) -> None:
    """Refuse, on every rank, rows or leaves that differ between ranks."""
    note = torch.tensor([rows, _digest(text), len(text)])
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
        # All ranks send, also those that agree, because a gather needs all ranks.
        longest = max(note[2] for note in notes)
        letters = ranks.gather_on_host(torch.tensor([*text.ljust(longest)], dtype=torch.uint8))
        ours, theirs = (json.loads(bytes(letters[rank].tolist())) for rank in (0, other))
        raise ValueError(
            "RankStack: expected the same leaves in the same order on every rank, found "
            f"{_leaf_difference(ours, theirs, ranks.name(0), ranks.name(other))}."
        )


def _described(stack: GradStack, keeps: bool) -> bytes:
    """Describe the leaves in order (names, shapes, dtypes) and the properties of the rows."""
    tensors: Mapping[str, Tensor] = {}
    if isinstance(stack, DenseStack):
        tensors = stack.rows
    elif isinstance(stack, BaseStack) and stack.origin is not None:
        tensors = stack.origin.params
    leaves = [
        [name, list(shape), str(tensors[name].dtype) if name in tensors else "unknown"]
        for name, shape in stack.shapes.items()
    ]
    if isinstance(stack, FusedStack) and stack.sharded.leaves:  # gathered again in the same order
        leaves.append(["order of uses", [*stack.sharded.order], "sharded"])
    return json.dumps([*leaves, [stack.losses is not None, keeps]]).encode()


def _leaf_difference(ours: list[Any], theirs: list[Any], one: int, other: int) -> str:
    """Describe the first difference between two ranks, and the fix."""
    advice = "Build the same model, with the same frozen parameters, on all ranks"
    *ours, known_here = ours
    *theirs, known_there = theirs
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            here, there = (f"{_leaf_text(a)} on rank {one}", f"{_leaf_text(b)} on rank {other}")
            return f"leaf {place} is {here} and {there}. {advice}"
    if len(ours) != len(theirs):
        return f"{len(ours)} leaves on rank {one} and {len(theirs)} on rank {other}. {advice}"
    what = 0 if known_here[0] != known_there[0] else 1
    here, there = ("known" if known[what] else "unknown" for known in (known_here, known_there))
    found = f"{('losses', 'keep')[what]} {here} on rank {one} and {there} on rank {other}"
    return f"{found}. Give them on all ranks or on none"


def _leaf_text(leaf: list[Any]) -> str:
    name, shape, dtype = leaf
    return f"{name!r} of shape {shape} and dtype {dtype}"


# --- The stack ---


FEW = 2
"""The number of local rows up to which an exchange sends less than two combinations."""


@copied("losses", "scale")
class RankStack(BaseStack):
    r"""Rows that live on different ranks, as one stack: row r·M + m is row m of rank r.

    Every rank gives its own M rows and asks the same questions in the same order. All get the same
    answers, bit for bit, and so make the same decisions. Transforms need no changes.

    ``gram`` sends every rank one shard of the local rows, takes a Gram there, and adds up the
    (M·W)² numbers; ``combine`` then sums on the shard and gathers. Of P parameters a rank sends

        gram:                   M·P (W − 1)/W numbers
        combine after a gram:     P (W − 1)/W
        combine without one:    2·P (W − 1)/W
        reduce_columns:       as a gram and a combine; after a gram as a combine
        dot, sq_norms:          M to every other rank

    For M = 1 a gram and a combination send as much as one ring all-reduce. `consensus_filter` uses
    them up to M = 2, else two combinations without a gram. ``stacked``, and so an adaptive
    `sam_perturb` per microbatch, sends all rows to all ranks: see `across_ranks` for a better way.
    `along` sends nothing but the losses.

    The constructor compares rows and leaves of all ranks, by a short message between CPUs, and
    gathers the losses. ``buffers`` and ``aux`` are the local ones: BatchNorm keeps statistics per
    rank, as in DistributedDataParallel without SyncBatchNorm.

    Args:
        stack: The local rows: a GradStack or a plain stacked dict, with the same M on every rank.
        group: The process group; None for all processes.
        keep: False if this rank would skip the step, () bool; None if there is no flag.

    Attributes:
        keep: True if no rank would skip the step, the same on all ranks. () bool.

    Raises:
        ValueError: Rows, leaves, shapes or dtypes differ between ranks; raised on all of them.
        RuntimeError: There is no process group; at a question, another rank has ended.

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

    losses: Tensor | None
    buffers: Tree
    aux: Any
    scale: Tensor | None
    origin: StackOrigin | None
    keep: Tensor

    def __init__(
        self,
        stack: GradStack | Tree,
        group: dist.ProcessGroup | None = None,
        *,
        keep: Tensor | bool | None = None,
    ) -> None:
        local, ranks = as_stack(stack), Ranks.of(group)
        self._view(validate_ranks(local, ranks, keep), None, len(local) * ranks.size)

    def _view(self, gathered: GatheredRows, scale: Tensor | None, count: int) -> Self:
        """Return the first ``count`` of the rows, scaled."""
        self._gathered, self.scale, self._count = gathered, scale, count
        self.origin = None
        losses = gathered.losses
        self.losses = None if losses is None else losses[:count]
        self.keep = gathered.keep
        self.buffers, self.aux = gathered.local.buffers, gathered.local.aux
        return self

    def _like_this(self, gathered: GatheredRows, scale: Tensor | None, count: int) -> Self:
        return self.__new__(type(self))._view(gathered, scale, count)

    @override
    def _scaled(self, scale: Tensor) -> Self:
        return self._like_this(self._gathered, scale, self._count)

    @override
    def _columns(self, names: Collection[str]) -> Self:
        return self._like_this(self._gathered.columns(names), self.scale, self._count)

    @override
    def _first(self, count: int) -> Self:
        scale = None if self.scale is None else self.scale[:count]
        return self._like_this(self._gathered, scale, count)

    @override
    def mean_over_ranks(self, tree: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ranks = self._gathered.ranks
        return {name: ranks.total(leaf) / ranks.size for name, leaf in tree.items()}

    @override
    def __len__(self) -> int:
        """Return the number of rows on all ranks together, M·W."""
        return self._count

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return self._gathered.local.shapes

    @property
    @override
    def device(self) -> torch.device:
        return self._gathered.numbers.device

    @property
    @override
    def live(self) -> Tensor:
        live = self._gathered.live[: self._count]
        return live if self.scale is None else live & (self.scale != 0)

    @override
    def gram_is_cheap(self) -> bool:
        """Return whether rows are exchanged, or an exchange sends less than two combinations."""
        few = len(self._gathered.local) <= FEW and len(self) <= GRAM_UP_TO
        return few or self._gathered.is_exchanged

    @override
    def gram(self) -> Tensor:
        gram = scale_rows(self._gathered.gram()[: self._count, : self._count], self.scale)
        return scale_rows(gram.T, self.scale).T

    @override
    def combine(self, weights: Tensor) -> Tree:
        """Compute wᵀ J for ``weights`` (M·W,), the same on every rank."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        cut_off = weights.new_zeros(len(self._gathered) - len(self))
        return self._gathered.combine(torch.cat([weights, cut_off]))

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        """Compute Σ_m w_m g_m² for ``weights`` (M·W,), the same on every rank."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(scale_rows(_tree.at_least_float32(weights), self.scale), self.scale)
        cut_off = weights.new_zeros(len(self._gathered) - len(self))
        return self._gathered.sum_squares(torch.cat([weights, cut_off]))

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Compute J v for a tree v that is the same on every rank. (M·W,)."""
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(self._gathered.dot(tree)[: self._count], self.scale)

    @override
    def sq_norms(self) -> Tensor:
        norms = scale_rows(self._gathered.sq_norms()[: self._count], self.scale)
        return scale_rows(norms, self.scale)

    @override
    def stacked(self) -> Tree:
        """Return all rows on every rank, leaf by leaf. (M·W, *shape)."""
        return self._gathered.stacked(partial(_first_scaled, self._count, self.scale))

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """Apply a function (M·W, n) -> (n,) to J; every rank gets some of the columns."""
        own = partial(_of_first_rows, function, self._count, self.scale)
        return self._gathered.reduce_columns(own)

    @override
    def at(self, params: Params) -> GradStack:
        """Return the same rows at other parameters, which are the same on every rank."""
        return self._with_local_rows(self._gathered.local.at(params))

    @override
    def at_rows(self, params: Tree) -> GradStack:
        # Leaves of other columns may also be given; the local rows know their names and shapes.
        shapes = {name: self.shapes.get(name, leaf.shape[1:]) for name, leaf in params.items()}
        check_shapes(shapes, params, "at_rows", rows=len(self))
        own = {}
        for name, leaf in params.items():
            # Rows that `first` cut off are also computed, so that every rank has M.
            rest = leaf[:1].expand(len(self._gathered) - len(self), *leaf.shape[1:])
            own[name] = self._gathered.local_part(torch.cat([leaf, rest]))
        return self._with_local_rows(self._gathered.local.at_rows(own))

    @override
    def along(self, factors: Tensor) -> GradStack:
        check_per_row("factor", factors, len(self))
        own = self._local_factors(factors)
        return self._with_local_rows(self._gathered.local.along(own))

    @override
    def _points(self, factors: Tensor) -> Tree:
        """Return the points of the local rows; `at_rows` reads no others."""
        found, gathered = {}, self._gathered
        for name, leaf in gathered.local._points(self._local_factors(factors)).items():
            rows = leaf[:1].expand(len(gathered), *leaf.shape[1:]).clone()
            gathered.local_part(rows).copy_(leaf)
            found[name] = rows[: len(self)]
        return found

    def _local_factors(self, factors: Tensor) -> Tensor:
        """Return the factors of the local rows, of which `scaled` and `first` know nothing."""
        factors = scale_rows(_tree.at_least_float32(factors), self.scale)
        rest = factors.new_zeros(len(self._gathered) - len(self))
        return self._gathered.local_part(torch.cat([factors, rest]))

    def _with_local_rows(self, local: GradStack) -> GradStack:
        ranks = self._gathered.ranks
        gathered = _gathered(local, ranks, ranks.gather(per_row(local)))
        return self._like_this(gathered, self.scale, self._count)

    @override
    def explain(self) -> str:
        """Return a text about how the rows of this rank are computed and held."""
        return f"{self!r}, of which this rank holds: {self._gathered.local.explain()}"

    @override
    def release(self) -> None:
        """Free everything that can be computed or exchanged again."""
        self._gathered.release()


def _first_scaled(count: int, scale: Tensor | None, rows: Tensor) -> Tensor:
    return scale_rows(rows[:count], scale)


def _of_first_rows(
    function: Callable[[Tensor], Tensor], count: int, scale: Tensor | None, columns: Tensor
) -> Tensor:
    return function(_first_scaled(count, scale, columns))


# --- Check that all ranks start with the same parameters and the same chain ---


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_start(params: Params, ranks: Ranks) -> None:
    """Refuse, on every rank, parameters that differ between ranks.

    The sums of their bits as integers are compared, so equal parameters always pass.

    Args:
        params: The parameters of this rank.
        ranks: The ranks that start together.

    Raises:
        ValueError: Leaves or values differ; the error names two ranks and a leaf.
    """
    check_leaves_alike(params, ranks)
    whole = {name: p for name, p in params.items() if not is_sharded(p)}
    if not whole:  # every rank holds another part of them
        return
    sums = torch.stack([sum_of_bits(p) for p in whole.values()]).cpu()
    found = ranks.gather_on_host(sums)
    for rank, other in enumerate(found):
        for name, same in zip(whole, (other == found[0]).tolist(), strict=True):
            if not same:
                raise ValueError(
                    f"across_ranks: expected the same parameters on every rank, found other values "
                    f"of {name!r} on rank {ranks.name(0)} than on rank {ranks.name(rank)}. Wrap "
                    "the model in DistributedDataParallel, which copies those of the first rank "
                    "to all, or seed all ranks alike before the model is made."
                )


def check_same_chain(parts: tuple[Transform, ...], ranks: Ranks) -> None:
    """Refuse, on every rank, chains or hyperparameters that differ between ranks.

    Only `across_ranks` and the transforms after it are compared, because they must do the same on
    all ranks. The transforms before it work on the rows of one rank.

    Args:
        parts: The transforms of the outermost chain, () if `across_ranks` is not in a chain.
        ranks: The ranks that start together.

    Raises:
        ValueError: They differ; the error names two ranks and the difference.
    """
    names = [part.name for part in parts]
    parts = parts[names.index("across_ranks") :] if "across_ranks" in names else parts
    own = [described(part) for part in parts]
    others = ranks.gather_texts(json.dumps(own))
    for rank, text in enumerate(others):
        if text != others[0]:
            raise ValueError(
                f"across_ranks: expected the same chain on every rank, found "
                f"{_chain_difference(json.loads(others[0]), json.loads(text), ranks, rank)}. Build "
                "it from the same numbers on all ranks; transforms that may differ belong before "
                "across_ranks()."
            )


def _chain_difference(ours: list[str], theirs: list[str], ranks: Ranks, rank: int) -> str:
    """Describe the first transform in which two ranks differ."""
    one, other = f"on rank {ranks.name(0)}", f"on rank {ranks.name(rank)}"
    pairs = zip_longest(ours, theirs, fillvalue="nothing")
    a, b = next((shortened(a), shortened(b)) for a, b in pairs if a != b)
    if a == b:
        return f"{a} {one} with other functions than {other}"
    return f"{a} {one} and {b} {other}"


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers, which is exact. ()."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)


# --- The transform ---


@factory
def across_ranks(group: dist.ProcessGroup | None = None) -> Transform:
    """Let the following transforms of a chain see the rows of all ranks, as a `RankStack`.

    The transforms before it run on every rank separately; those after it do the same on all ranks.
    So its place in a chain is a choice:

        chain(across_ranks(), agree_filter(t), sam_perturb(r), sgd(lr))  # one perturbation for all
        chain(sam_perturb(r), across_ranks(), mean_rows(), sgd(lr))      # m-sharpness: every rank
                                                       # perturbs along its own gradient
        chain(clip_per_row(c), across_ranks(), consensus_filter(), sgd(lr))

    All ranks start from the same parameters, and run the same chain from this transform on:
    ``init`` compares both, including hyperparameters. Their parameters then stay equal in every
    bit. If one rank would skip a step, by a ``keep`` from its caller or a transform before this
    one, all ranks skip it. Put `finite_filter` behind this transform to reject the rows of such a
    rank instead.

    Results from before this transform are not changed: ``info["loss"]`` of a `train_step`, the
    ``loss`` of a `Filtered` step and metrics of earlier transforms are those of this rank's rows.
    In a step of `gradfilter.compile` the collectives are operations of the graph.
    If the parameters are sharded over ranks, so are sums of rows, and the group has the ranks with
    other samples: those along the dims of FSDP, not those of tensor parallelism.
    ``value`` for a `plateau` schedule must be the same on all ranks; `RankStack.losses` has all
    losses.

    Args:
        group: The process group; None for all processes.

    Needs: rows, the same number on every rank.

    Publishes: ``keep`` () if an earlier transform or the caller did; ``clean_grads``, as rows of
    all ranks, if a sam_perturb before it did.

    Raises:
        ValueError: On every rank: at ``init``, if parameters, transforms from here on or their
            hyperparameters differ between ranks; at a step, if rows do.
        RuntimeError: There is no process group, or another rank has ended.

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
        rows: GradStack, state: State, params: Params, context: Context
    ) -> tuple[GradStack, State, Out]:
        keep, clean = context.keep, context.clean_grads
        make_rank_stack = untraced(RankStack)  # ranks communicate between compiled graphs
        gathered = make_rank_stack(rows, group, keep=keep)
        out: Out = {} if keep is None else {"keep": gathered.keep}
        if isinstance(clean, GradStack):
            out["clean_grads"] = make_rank_stack(clean, group)
        return gathered, state, out

    def init(params: Params) -> State:
        ranks = Ranks.of(group)
        check_same_start(params, ranks)
        check_same_chain(whole_chain(), ranks)
        return {}

    return transform_in_context("across_ranks", "rows -> rows", update, init=init)
