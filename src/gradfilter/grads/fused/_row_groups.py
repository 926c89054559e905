"""Run one pass for each group of rows that give the host the same answers; merge the results.

A loss may convert a tensor to a Python value: ``if mask.all():`` in a model for padded text is
true for the longest rows and false for the others. One pass can take only one branch, so rows with
different answers run in different groups. The results are merged factor by factor, in the order of
the rows. The stack then looks as if it came from one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree
from gradfilter._shards import is_sharded
from gradfilter.grads._batch import Batch
from gradfilter.grads._call_context import (
    CallContext,
    random_state,
    same_random_state,
    undo_draws,
)
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._remembered_attributes import check_remembered
from gradfilter.grads.fused._along import held
from gradfilter.grads.fused._conv_factor import ConvFactor
from gradfilter.grads.fused._factors import (
    DenseFactor,
    EmbeddingFactor,
    Factor,
    OuterFactor,
    TiledFactor,
    join_uses,
)
from gradfilter.grads.fused._forward import BatchWritten, Forward, forward
from gradfilter.grads.fused._modules_by_row import ByRow
from gradfilter.grads.fused._row_questions import Disagreement
from gradfilter.grads.fused._tape import LeafVisitor, Tape, Use

# --- Merge the factors of groups into one factor of all rows ---


@dataclass(frozen=True)
class FactorPart:
    """The factors of one leaf from a pass over some rows, one for each use.

    Attributes:
        rows: The numbers of the rows. (k,) int64.
        factors: One per use.
    """

    rows: Tensor
    factors: list[Factor]


def merged(parts: list[FactorPart], count: int) -> list[Factor]:
    """Merge the factors of a leaf for all rows; rows in no part have a gradient of zero."""
    if len({len(part.factors) for part in parts}) == 1:
        rows = [part.rows for part in parts]
        uses = zip(*(part.factors for part in parts), strict=True)
        return [_merged_use(list(use), rows, count) for use in uses]
    # Some rows use the leaf more often than others, so the uses cannot be paired.
    sums = [
        part.factors[0] if len(part.factors) == 1 else TiledFactor(part.factors) for part in parts
    ]
    return [GroupedFactor(sums, [part.rows for part in parts], count)]


FIELDS: dict[type[Factor], tuple[str, ...]] = {
    ConvFactor: ("inputs", "outputs"),
    DenseFactor: ("held",),
    EmbeddingFactor: ("index", "grads"),
    OuterFactor: ("inputs", "outputs"),
}
"""The attributes with a row axis (M, ...) of the factors that can be merged."""


def _merged_use(factors: list[Factor], rows: list[Tensor], count: int) -> Factor:
    """Merge factors into one for all rows, of the same kind if the tensors of the parts fit."""
    first: Any = factors[0]
    one_kind = len({type(factor) for factor in factors}) == 1
    names = FIELDS.get(type(first), ()) if one_kind else ()
    complete = sum(map(len, rows)) == count
    alike = len({getattr(factor, "geometry", None) for factor in factors}) == 1
    tensors = {name: [getattr(factor, name) for factor in factors] for name in names}
    fit = all(len({(t.dtype, t.shape[1:]) for t in each}) == 1 for each in tensors.values())
    if not (names and complete and alike and fit):
        return GroupedFactor(factors, rows, count)
    joined: Factor = replace(first, **{name: gathered(t, rows) for name, t in tensors.items()})
    return joined


def gathered(tensors: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Merge tensors (k, ...) of groups of rows into one, in the order of the rows. (M, ...)."""
    found = tensors[0].new_empty(sum(map(len, rows)), *tensors[0].shape[1:])
    for tensor, places in zip(tensors, rows, strict=True):
        found[places] = tensor
    return found


@dataclass(eq=False)
class GroupedFactor(Factor):
    """Factors of groups of rows that cannot be merged into one factor of their kind.

    Attributes:
        parts: One factor for each group.
        places: The numbers of the rows of each group. (k,) int64.
        count: M.
    """

    parts: list[Factor]
    places: list[Tensor]
    count: int

    def __post_init__(self) -> None:
        self.shape = self.parts[0].shape
        self.unit = max(part.unit for part in self.parts)

    def _per_row(self, answer: Callable[[Factor], Tensor]) -> Tensor:
        """Return the parts' answers (k, ...), in the order of the rows. (M, ...)."""
        answers = [answer(part) for part in self.parts]
        dtype = reduce(torch.promote_types, (found.dtype for found in answers))
        rows = answers[0].new_zeros((self.count, *answers[0].shape[1:]), dtype=dtype)
        for places, found in zip(self.places, answers, strict=True):
            rows[places] = found.to(dtype)
        return rows

    @override
    def rows(self, low: int = 0, high: int | None = None) -> Tensor:
        return self._per_row(lambda part: part.rows(low, high))

    @override
    def total(self, weights: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        def own(values: Tensor | None, places: Tensor) -> Tensor | None:
            return None if values is None else values[places]

        totals = [
            part.total(own(weights, places), own(live, places))
            for part, places in zip(self.parts, self.places, strict=True)
        ]
        return reduce(torch.add, totals)

    @override
    def dot(self, leaf: Tensor) -> Tensor:
        return self._per_row(lambda part: part.dot(leaf))

    @override
    def sq_norms(self) -> Tensor:
        return self._per_row(lambda part: part.sq_norms())

    @override
    def gram(self) -> Tensor:
        """Compute each group's Gram, and the products of the rows of every two groups."""
        some = self.places[0]
        gram = torch.zeros(self.count, self.count, dtype=_tree.sum_dtype(some), device=some.device)
        groups = list(zip(self.parts, self.places, strict=True))
        for i, (part, places) in enumerate(groups):
            gram[places[:, None], places] = part.gram()
            for other, elsewhere in groups[:i]:
                products = _group_products(part, other)
                gram[places[:, None], elsewhere] = products
                gram[elsewhere[:, None], places] = products.T
        return gram


def _group_products(a: Factor, b: Factor) -> Tensor:
    """Compute the products of every row of one factor with every row of another."""
    if a.count > b.count:
        return _group_products(b, a).T
    return torch.stack([b.dot(row) for row in a.rows()])


# --- The groups ---


MOST_GROUPS = 8
"""The largest number of groups; with more, the loop is hardly slower, as each takes a pass."""


@dataclass
class Grouping:
    """The way the rows of a batch run, learned in the first pass and used by further passes.

    Attributes:
        by_row: The modules that run row by row.
        groups: The rows of each group, in order; None before the first pass. The empty list stands
            for all rows.
        copies: True if the loss writes into the batch, so that it gets a copy.
    """

    by_row: ByRow
    groups: list[list[int]] | None = None
    copies: bool = False


def forward_in_groups(
    loss: NormalizedLoss,
    params: Mapping[str, Tensor],
    batch: Batch,
    per_row: bool,
    grouping: Grouping,
    context: CallContext,
    *,
    check: bool = False,
) -> Forward:
    """Run a forward pass over all rows, with one group for each set of answers to the host.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: All rows.
        per_row: True if every row has its own parameters.
        grouping: The grouping to begin with; the first pass stores its result there.
        context: The context of the call, with the random state at its start.
        check: True to refuse module state that one group leaves for the rows of others.

    Raises:
        RuntimeError: The rows cannot be split into groups: there are too many groups, they write
            into buffers, or random numbers would differ from those of the first pass.
    """
    begin: list[list[int]] = [[]] if grouping.groups is None else grouping.groups
    ahead, start = [*begin], context.random
    parts: list[tuple[list[int], Forward]] = []
    left: list[set[str]] = []
    refused = False
    while ahead:
        rows = ahead[0]
        whole = not rows
        own = params if whole or not per_row else {name: p[rows] for name, p in params.items()}
        some = batch if whole else replace(batch, tensors=[t[rows] for t in batch.tensors])
        copies = grouping.copies
        if copies:
            some = replace(some, tensors=[t.clone() for t in some.tensors])
        if parts or refused:  # each attempt and each group finds the modules in their first state
            context.attributes.restore()
        try:
            part = forward(loss, own, some, per_row, grouping.by_row, own_batch=copies)
        except BatchWritten:  # again with copies, from where this group started
            grouping.copies = True
            undo_draws(start, context.device)
            context.host.restore()
            context.attributes.restore()
            continue
        except RuntimeError as refusal:
            refused = True
            if isinstance(refusal, Disagreement) and any(map(is_sharded, held(params).values())):
                raise RuntimeError(
                    f"{refusal}. Ranks with sharded parameters cannot run several passes, because "
                    "each rank would run another number of them"
                ) from refusal
            # A group would draw other random numbers, and with those rows may answer differently.
            groups: list[list[int]] = []
            if isinstance(refusal, Disagreement) and not _has_drawn(start, context):
                groups = _grouped_by_answer(rows or range(batch.count), refusal.answers)
            count = len(parts) + len(groups) + len(ahead) - 1
            if groups and (count == 2 or count < batch.count) and count <= MOST_GROUPS:
                ahead[:1] = groups
            elif grouping.by_row.learn(refusal, loss.modules):
                # The groups may come from questions that are now answered row by row.
                ahead, parts, left, start = [*begin], [], [], context.random
            else:
                raise
            undo_draws(start, context.device)
            context.host.restore()
            continue
        parts.append((rows, part))
        ahead.pop(0)
        if not whole and check:
            left.append({name for name, *_ in context.attributes.changes()})
            if ahead:
                last = [group[-1] for group in (*(rows for rows, _ in parts), *ahead)]
                check_remembered(loss, dict(params), batch, context, part.remembered, last)
        if ahead:
            start = random_state(context.device)
    _check_left(left)
    if refused and grouping.groups is not None:
        _check_draws(context)
    if grouping.groups is None:
        grouping.groups = [rows for rows, _ in parts]
    return parts[0][1] if len(parts) == 1 else _merged_passes(parts, batch)


def _grouped_by_answer(rows: Sequence[int], answers: list[str]) -> list[list[int]]:
    """Group rows by answer; the group of the last row runs last, as modules keep its state."""
    groups: dict[str, list[int]] = {}
    for row, answer in zip(rows, answers, strict=True):
        groups.setdefault(answer, []).append(row)
    return sorted(groups.values(), key=max)


def _has_drawn(start: dict[str, Any], context: CallContext) -> bool:
    """Return whether random numbers have been drawn since ``start``."""
    return not same_random_state(random_state(context.device), start)


def _check_left(left: list[set[str]]) -> None:
    """Refuse groups that change an attribute which the last group does not change."""
    lost = set[str]().union(*left) - left[-1] if left else ()
    if lost:
        raise RuntimeError(
            f"Passes over groups of rows cannot hand on attribute {min(lost)!r}, which the forward "
            "pass changes in some rows and not in others. Make it a buffer (register_buffer)"
        )


def _check_draws(context: CallContext) -> None:
    if _has_drawn(context.random, context):
        raise RuntimeError(
            "Expected rows that answer the host alike as in the first pass over them, found some "
            "that do not at these parameters, and random numbers, which are drawn for all rows "
            'that answer alike together. Use plan="loop".'
        )


def _merged_passes(parts: list[tuple[list[int], Forward]], batch: Batch) -> Forward:
    """Merge the passes over groups of rows into one."""
    for _, part in parts:
        for name, buffer in part.buffers.items():
            if not torch.equal(buffer, batch.buffers[name]):
                raise RuntimeError(
                    f"Passes over groups of rows cannot hand buffer {name!r}, which the forward "
                    "pass writes, from row to row, and the loss asks for a value that differs "
                    'from row to row. Use plan="loop".'
                )
    first = parts[0][1]
    places = [torch.tensor(rows, device=first.losses.device) for rows, _ in parts]
    passes = [part for _, part in parts]
    with torch.no_grad():
        losses = gathered([part.losses for part in passes], places)
        aux = first.aux
        if aux is not None:
            aux = _tree.tree_map(lambda *t: gathered(list(t), places), *(p.aux for p in passes))
    leaves = {
        name: leaf.detach()[:1].expand(batch.count, *leaf.shape[1:])
        for name, leaf in first.tape.leaves.items()
    }
    tape = GroupedTape(
        leaves,
        uses=_uses([part.tape for part in passes], batch.count),
        overrides=sum((part.tape.overrides for part in passes), Counter()),
        ignored=_ignored([part.tape for part in passes], places),
        linear=all(part.tape.linear for part in passes),
        parts=list(zip(places, passes, strict=True)),
    )
    groups = tuple(tuple(rows) for rows, _ in parts)
    used = set().union(*(part.used for part in passes))
    return Forward(
        losses,
        tape,
        first.buffers,
        aux,
        groups=groups,
        by_row=first.by_row,
        used=used,
        changed=any(p.changed for p in passes),
        checkpointed=any(p.checkpointed for p in passes),
    )


def _ignored(tapes: list[Tape], places: list[Tensor]) -> Tensor | None:
    """Return the rows that had only ignored labels, if all passes recorded them."""
    noted = [tape.ignored for tape in tapes if tape.ignored is not None]
    return gathered(noted, places) if len(noted) == len(tapes) else None


def _uses(tapes: list[Tape], count: int) -> list[Use]:
    """Return the uses of leaves by overrides as if all rows had been in one pass."""
    paths = {tuple((use.leaf, use.override) for use in tape.uses) for tape in tapes}
    if len(paths) > 1:
        return [use._replace(ghost_flops=None, product=None) for tape in tapes for use in tape.uses]
    rows = [len(next(iter(tape.leaves.values()))) for tape in tapes]

    most = max(range(len(rows)), key=rows.__getitem__)
    found = []
    for uses in zip(*(tape.uses for tape in tapes), strict=True):
        ghosts = [use.ghost_flops for use in uses]
        ghost = None if None in ghosts else ghosts[most]
        together = uses[0]._replace(
            flops=sum(use.flops for use in uses),
            kept=sum(use.kept for use in uses),
            ghost_flops=ghost and ghost * count**2 // rows[most] ** 2,
            product=uses[0].product and uses[0].product._replace(rows=count),
        )
        found.append(together)
    return found


@dataclass
class GroupedTape(Tape):
    """The tapes of passes over groups of rows as one.

    A backward pass runs group after group. A leaf is complete when the last group has run, so the
    factors of all leaves are held until then.

    Attributes:
        parts: The rows of each group, and the pass over them.
    """

    parts: list[tuple[Tensor, Forward]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Register no hooks on the leaves; those of the parts have them."""

    @override
    def backward(
        self, losses: Tensor, cotangent: Tensor, visitor: LeafVisitor, *, retain: bool
    ) -> None:
        """Run the backward passes of all groups, each with the modules and modes that it needs."""
        found: dict[str, list[FactorPart]] = {}
        for rows, part in self.parts:
            part.backward(cotangent[rows], _Collector(rows, found), retain=retain)
        with torch.no_grad():  # as it is while a backward pass runs
            for name in list(found):
                visitor.visit(name, merged(found.pop(name), len(losses)), None)


@dataclass(frozen=True)
class _Collector(LeafVisitor):
    """Collects the factors of one group's leaves.

    Attributes:
        rows: The numbers of the group's rows. (k,) int64.
        found: The parts of each leaf, those of earlier groups first.
    """

    rows: Tensor
    found: dict[str, list[FactorPart]]

    @override
    def visit(self, name: str, factors: list[Factor], grad: Tensor | None) -> None:
        own = join_uses(factors)
        if grad is not None:
            own.append(DenseFactor(grad))
        self.found.setdefault(name, []).append(FactorPart(self.rows, own))
