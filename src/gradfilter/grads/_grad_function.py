"""From a loss to a function of parameters and batch: checks, the choice of plan, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._ambient import Ambient, random_state
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._batch import Batch, check_device, check_params, more_than_a_batch, split
from gradfilter.grads._budget import bytes_of
from gradfilter.grads._by_row import ByRow
from gradfilter.grads._check_loss import RefusedByAll
from gradfilter.grads._chunked import chunked_rows
from gradfilter.grads._dense import DenseStack
from gradfilter.grads._fused import BatchWritten, Forward, forward
from gradfilter.grads._fused_stack import FusedStack
from gradfilter.grads._groups import Grouping, forward_in_groups
from gradfilter.grads._lift import untraced
from gradfilter.grads._loop import Rows, loop_rows
from gradfilter.grads._notes import add_plan_note, note_anomaly, stacklevel
from gradfilter.grads._pass import Pass
from gradfilter.grads._remembered import check_remembered
from gradfilter.grads._single import forward_single
from gradfilter.grads._versions import Versions
from gradfilter.grads._vmap import vmap_rows

Plan = Literal["auto", "loop", "vmap", "fused"]


@dataclass(frozen=True, eq=False)
class GradFunction:
    """``(params, batch, *, buffers=None) -> GradStack``, made by `microbatch_grads`."""

    loss: Callable[..., Any]
    microbatches: int | None
    has_aux: bool
    plan: Plan
    chunk_size: int | None
    memory_budget: int | float
    by_row: ByRow = field(default_factory=ByRow, init=False, repr=False)

    def __call__(
        self, params: Params, batch: Any, *more: Any, buffers: Tree | None = None
    ) -> AgainStack:
        """The gradients of one batch.

        Args:
            params: ``dict[str, Tensor]``, floating point, all that is to be differentiated.
            batch: Any tree of tensors with leading axis N.
            *more: Refused.
            buffers: What the module's buffers are before the first row; the stack's ``buffers``
                are what they are after the last. None takes the module's own, at every call.
        """
        if more:
            raise more_than_a_batch("grads_of(params, batch)", "grads_of(params, (x, y))", more)
        return untraced(self._stack_of)(params, batch, buffers)

    def _stack_of(self, params: Params, batch: Any, buffers: Tree | None) -> AgainStack:
        check_params(params)
        loss = AnyLoss.of(self.loss, self.has_aux)
        loss.check_params(params)
        tensors, rebuild = split(batch, self.microbatches)
        check_device(params, tensors)
        rows = Batch(tensors, rebuild, loss.incoming(buffers))
        ambient = Ambient.now(
            _tree.device_of(params),
            loss.modules,
            _read(loss, rows),
            loss.attributes,
            everywhere=loss.may_draw_on_host,
        )
        return Evaluation(self, loss, rows, ambient, params).first()


@dataclass(eq=False)
class Evaluation:
    """One batch, its loss and the moment it was met: what all passes over it have in common.

    Attributes:
        settings: Of the function that was called.
        loss: The loss.
        batch: The rows.
        ambient: The moment of the call.
        params: As they were given.
    """

    settings: GradFunction
    loss: AnyLoss
    batch: Batch
    ambient: Ambient
    params: Params
    _grouping: Grouping = field(init=False)
    _random_after: dict[str, Any] | None = None
    _copies: bool = False

    def __post_init__(self) -> None:
        """Note how often the parameters have been written."""
        self._grouping = Grouping(ByRow(self.settings.by_row))
        self._given = Versions((f"parameter {name!r}", p) for name, p in self.params.items())

    def first(self) -> AgainStack:
        """The stack of the call."""
        plan = self.settings.plan
        try:
            if plan == "auto":
                return self._fused_or_loop(self.params, False)
            return self._stack(plan, self.params, False)
        finally:
            self.loss.first = False

    def _elsewhere(self, plan: Plan, params: Params, per_row: bool, kept: Collection[str]) -> Any:
        """The stack at other parameters, ``kept`` of them as they were given."""
        return untraced(self._pass_elsewhere)(plan, params, per_row, kept)

    def _pass_elsewhere(
        self, plan: Plan, params: Params, per_row: bool, kept: Collection[str]
    ) -> AgainStack:
        self._check_kept(kept)
        with self.ambient.again():
            if plan == "fused" and self.settings.plan == "auto":
                return self._fused_or_loop(params, per_row)
            return self._stack(plan, params, per_row)

    def _check_kept(self, names: Collection[str]) -> None:
        if names:
            self._given.check({f"parameter {name!r}" for name in names})

    def _fused_or_loop(self, params: Params, per_row: bool) -> AgainStack:
        try:
            return self._stack("fused", params, per_row)
        except RefusedByAll:
            self.ambient.rewind()  # what was left in the modules is of no use to anybody
            raise
        except Exception as refusal:
            self._check_undrawn(refusal)
            # The loop says whether the loss or only vmap was at fault, on the same random numbers.
            self.ambient.rewind()
            try:
                result = self._stack("loop", params, per_row)
            except Exception as fault:
                raise fault from None
            _warn(refusal)
            return result

    def _stack(self, plan: Plan, params: Params, per_row: bool) -> AgainStack:
        """The rows by one plan, as random state and settings are at present."""
        at = {name: p.detach() for name, p in params.items()}
        origin = Origin(len(self.batch), params if per_row else at, partial(self._elsewhere, plan))
        try:
            if plan == "fused":
                return self._fused(at, per_row, origin)
            grads, losses, after, aux = self._rows(plan, at, per_row)
        except Exception as error:
            add_plan_note(error, plan)
            raise
        return DenseStack(grads, losses, after, aux, origin=origin)

    def _rows(self, plan: Plan, params: Params, per_row: bool) -> Rows:
        try:
            if plan == "loop":
                return loop_rows(self.loss, params, self.batch, per_row)
            size, used = self.settings.chunk_size, set[str]()
            rows = vmap_rows(self.loss, params, self.batch, per_row, chunk_size=size, used=used)
        except RuntimeError as error:
            note_anomaly(error)
            raise
        if not per_row:
            check_remembered(self.loss, params, self.batch, self.ambient, used)
        return rows

    def _fused(self, params: Params, per_row: bool, origin: Origin) -> AgainStack:
        def check(part: Forward, rows: Sequence[int]) -> None:
            used = part.used if part.changed else None
            check_remembered(self.loss, params, self.batch, self.ambient, used, rows)

        def run(batch: Batch, params: Params, grouping: Grouping, first: bool = False) -> Forward:
            if len(batch) == 1:
                return forward_single(self.loss, params, batch, per_row, self.ambient.modes)
            found = forward_in_groups(
                partial(self._at_once, per_row=per_row, by_row=grouping.by_row),
                batch,
                params,
                per_row,
                grouping,
                self.ambient,
                lambda: self.loss.modules,
                check if first and not per_row else None,
            )
            self.settings.by_row.update(grouping.by_row)
            return found

        if per_row and self.settings.chunk_size is not None:
            rows = chunked_rows(
                lambda batch, params: run(batch, params, Grouping(self._grouping.by_row)),
                self.batch,
                params,
                self.settings.chunk_size,
            )
            if rows is not None:
                grads, losses, after, aux = rows
                return DenseStack(grads, losses, after, aux, origin=origin)
        given = Versions((f"parameter {name!r}", p) for name, p in params.items())
        first = run(self.batch, params, self._grouping, True)
        losses = first.losses.detach()
        if not per_row:
            if len(self.batch) > 1:
                check(first, [group[-1] for group in first.groups] or [-1])
            if self._random_after is None:
                self._random_after = random_state(self.ambient.device)

        def again() -> Forward:
            given.check()
            with self.ambient.again():
                found = run(self.batch, params, self._grouping)
            _check_repeated(losses, found.losses.detach())
            return found

        def instead(refusal: Exception) -> Tree:
            given.check()
            return self._instead(params, per_row, refusal)

        budget = bytes_of(self.settings.memory_budget, self.ambient.device)
        return FusedStack(
            Pass(again, first, budget, instead, self.loss.hooks),
            tuple(params),
            len(losses),
            losses,
            first.buffers,
            first.aux,
            origin,
        )

    def _at_once(self, batch: Batch, params: Params, per_row: bool, by_row: ByRow) -> Forward:
        if not self._copies:
            try:
                return forward(self.loss, params, batch, per_row, by_row)
            except BatchWritten:
                self._copies = True
                self.ambient.rewind()
        copies = replace(batch, tensors=[t.clone() for t in batch.tensors])
        return forward(self.loss, params, copies, per_row, by_row, own_batch=True)

    def _instead(self, params: Params, per_row: bool, refusal: Exception) -> Tree:
        """The rows by the loop, where the backward pass over all rows was refused."""
        if self.settings.plan != "auto" or len(self.batch) == 1:
            add_plan_note(refusal, self.settings.plan)
            raise refusal
        self._check_undrawn(refusal)
        with self.ambient.again():
            try:
                rows = loop_rows(self.loss, params, self.batch, per_row)[0]
            except Exception as fault:
                note_anomaly(fault)
                raise fault from None
        _warn(refusal)
        return rows

    def _check_undrawn(self, refusal: Exception) -> None:
        """Refuse the loop where it would draw other random numbers than the pass before it."""
        before, after = self.ambient.random, self._random_after
        if after is not None and any(not torch.equal(after[kind], before[kind]) for kind in before):
            raise RuntimeError(
                f"{_reason(refusal)}. The rows drew their random numbers all at once, and the loop "
                'cannot draw them again. Pass plan="loop" from the start.'
            ) from refusal


def _read(loss: AnyLoss, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """What a pass reads in addition to the parameters."""
    yield from (("batch", t) for t in batch.tensors)
    yield from ((f"buffer {name!r}", b) for name, b in batch.buffers.items())
    yield from loss.criterion_buffers()


def _check_repeated(losses: Tensor, again: Tensor) -> None:
    """Refuse another pass that is not the same: something was written that nobody can watch."""
    if losses.device.type != "cpu":  # asking would wait for the device
        return
    tolerance = 64 * torch.finfo(losses.dtype).eps  # other numbers of threads sum in other orders
    size = float(losses[losses.isfinite()].abs().max()) if losses.isfinite().any() else 0.0
    if not torch.allclose(again, losses, tolerance, tolerance * size, equal_nan=True):
        raise RuntimeError(
            "Expected another pass over the batch to give the losses of the first, found others. "
            "Parameters were written in place since (fused optimizers leave no trace), or the loss "
            "depends on something outside of its arguments. Ask before writing, or compute the "
            "stack from clones."
        )


def _reason(refusal: Exception) -> str:
    reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
    return reason.rstrip(".").removesuffix('. Use plan="loop"')


def _warn(refusal: Exception) -> None:
    """Say that the loop was taken and why, at the caller's line."""
    warnings.warn(
        f'Fell back to plan "loop": {_reason(refusal)}. Pass plan="loop" to choose it outright.',
        stacklevel=stacklevel(),
    )
