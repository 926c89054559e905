"""From a loss to a function of parameters and batch: checks, the choice of plan, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._ambient import Ambient, set_random_state
from gradfilter.grads._any_loss import AnyLoss
from gradfilter.grads._batch import Batch, check_device, check_params, split
from gradfilter.grads._budget import bytes_of
from gradfilter.grads._by_row import ByRow
from gradfilter.grads._chunked import chunked_rows
from gradfilter.grads._dense import DenseStack
from gradfilter.grads._fused import Forward, forward
from gradfilter.grads._fused_stack import FusedStack
from gradfilter.grads._groups import Grouping, forward_in_groups
from gradfilter.grads._lift import untraced
from gradfilter.grads._loop import Rows, loop_rows
from gradfilter.grads._loss import ModelLoss
from gradfilter.grads._pass import Pass
from gradfilter.grads._single import forward_single
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
    _by_row: ByRow = field(default_factory=ByRow, init=False, repr=False)

    def __call__(self, params: Params, batch: Any, *, buffers: Tree | None = None) -> AgainStack:
        """The gradients of one batch.

        Args:
            params: ``dict[str, Tensor]``, floating point, all that is to be differentiated.
            batch: Any tree of tensors with leading axis N.
            buffers: What the module's buffers are before the first row; the stack's ``buffers``
                are what they are after the last. None takes the module's own, at every call.
        """
        check_params(params)
        loss = AnyLoss.of(self.loss, self.has_aux)
        loss.check_params(params)
        tensors, rebuild = split(batch, self.microbatches)
        check_device(params, tensors)
        rows = Batch(tensors, rebuild, loss.incoming(buffers))
        model = self.loss.model if isinstance(self.loss, ModelLoss) else None
        # Reading random states breaks any graph, and torch 2.11's compiler warns of the autocast.
        ambient = untraced(Ambient.now)(_tree.device_of(params), model)
        if self.plan != "auto":
            return self._stack(self.plan, loss, rows, ambient, params)
        try:
            return self._stack("fused", loss, rows, ambient, params)
        except Exception as refusal:
            # The loop says whether the loss or only vmap was at fault, on the same random numbers.
            set_random_state(ambient.random, ambient.device)
            try:
                result = self._stack("loop", loss, rows, ambient, params)
            except Exception as fault:
                raise fault from None
            reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
            reason = reason.rstrip(".").removesuffix('. Use plan="loop"')
            warnings.warn(
                f'Fell back to plan "loop": {reason}. Pass plan="loop" to choose it outright.',
                stacklevel=2,
            )
            return result

    def _stack(
        self, plan: Plan, loss: AnyLoss, batch: Batch, ambient: Ambient, params: Params
    ) -> AgainStack:
        """The rows by one plan, as random state and settings are at present."""
        grouping = Grouping()

        def evaluate(elsewhere: Params, per_row: bool) -> AgainStack:
            with ambient.again():
                return stack(elsewhere, per_row)

        def stack(at: Params, per_row: bool) -> AgainStack:
            at = {name: p.detach() for name, p in at.items()}
            origin = Origin(len(batch.tensors[0]), params if per_row else at, evaluate)
            if plan == "fused":
                return untraced(self._fused)(loss, batch, ambient, at, per_row, origin, grouping)
            grads, losses, after, aux = self._rows(plan, loss, batch, at, per_row)
            return DenseStack(grads, losses, after, aux, origin=origin)

        return stack(params, False)

    def _rows(self, plan: Plan, loss: AnyLoss, batch: Batch, params: Params, per_row: bool) -> Rows:
        if plan == "loop":
            return loop_rows(loss, params, batch, per_row)
        return vmap_rows(
            loss.writing,
            params,
            batch,
            per_row,
            cumulative=loss.cumulative,
            chunk_size=self.chunk_size,
        )

    def _fused(
        self,
        loss: AnyLoss,
        batch: Batch,
        ambient: Ambient,
        params: Params,
        per_row: bool,
        origin: Origin,
        grouping: Grouping,
    ) -> AgainStack:
        def at_once(batch: Batch, params: Params) -> Forward:
            return forward(loss.writing, params, batch, per_row, loss.cumulative, self._by_row)

        def learn(refusal: RuntimeError) -> bool:
            return self._by_row.learn(refusal, loss.modules)

        def run(batch: Batch, params: Params, grouping: Grouping) -> Forward:
            if len(batch) == 1:
                return forward_single(loss, params, batch, per_row, ambient.modes)
            return forward_in_groups(at_once, batch, params, per_row, grouping, ambient, learn)

        def again() -> Forward:
            with ambient.again():
                return run(batch, params, grouping)

        if per_row and self.chunk_size is not None:
            rows = chunked_rows(
                lambda batch, params: run(batch, params, Grouping()),
                batch,
                params,
                self.chunk_size,
            )
            if rows is not None:
                grads, losses, after, aux = rows
                return DenseStack(grads, losses, after, aux, origin=origin)
        first = run(batch, params, grouping)
        budget = bytes_of(self.memory_budget, ambient.device)
        losses = first.losses.detach()
        return FusedStack(
            Pass(again, first, budget),
            tuple(params),
            len(losses),
            losses,
            first.buffers,
            first.aux,
            origin,
        )
