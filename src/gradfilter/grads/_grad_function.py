"""From a loss to a function of parameters and batch: checks, the choice of plan, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._again import AgainStack, Origin
from gradfilter.grads._ambient import Ambient, set_random_state
from gradfilter.grads._batch import Batch, check_device, check_params, split
from gradfilter.grads._budget import bytes_of
from gradfilter.grads._check_loss import check_value
from gradfilter.grads._chunked import chunked_rows
from gradfilter.grads._dense import DenseStack
from gradfilter.grads._fused import Forward, forward
from gradfilter.grads._fused_stack import FusedStack
from gradfilter.grads._lift import untraced
from gradfilter.grads._loop import Rows, loop_rows
from gradfilter.grads._loss import ModelLoss, check_names
from gradfilter.grads._pass import Pass
from gradfilter.grads._running_stats import cumulative_means
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

    def __call__(self, params: Params, batch: Any, *, buffers: Tree | None = None) -> AgainStack:
        """The gradients of one batch.

        Args:
            params: ``dict[str, Tensor]``, floating point, all that is to be differentiated.
            batch: Any tree of tensors with leading axis N.
            buffers: What the module's buffers are before the first row; the stack's ``buffers``
                are what they are after the last. None takes the module's own.
        """
        check_params(params)
        if self._model is not None:
            own = self._model.named_parameters()
            check_names("parameters", params, {name: p for name, p in own if p.requires_grad})
        tensors, rebuild = split(batch, self.microbatches)
        check_device(params, tensors)
        rows = Batch(tensors, rebuild, self._incoming(buffers))
        ambient = Ambient.now(_tree.device_of(params), self._model)
        if self.plan != "auto":
            return self._stack(self.plan, rows, ambient, params)
        try:
            return self._stack("fused", rows, ambient, params)
        except Exception as refusal:
            # The loop says whether the loss or only vmap was at fault, on the same random numbers.
            set_random_state(ambient.random, ambient.device)
            try:
                result = self._stack("loop", rows, ambient, params)
            except Exception as fault:
                raise fault from None
            reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
            warnings.warn(
                f'Fell back to plan "loop": {reason.rstrip(".")}. Pass plan="loop" to choose it '
                "outright.",
                stacklevel=2,
            )
            return result

    def _stack(self, plan: Plan, batch: Batch, ambient: Ambient, params: Params) -> AgainStack:
        """The rows by one plan, as random state and settings are at present."""

        def evaluate(elsewhere: Params, per_row: bool) -> AgainStack:
            with ambient.again():
                return stack(elsewhere, per_row)

        def stack(at: Params, per_row: bool) -> AgainStack:
            at = {name: p.detach() for name, p in at.items()}
            origin = Origin(len(batch.tensors[0]), params if per_row else at, evaluate)
            if plan == "fused":
                return untraced(self._fused)(batch, ambient, at, per_row, origin)
            grads, losses, after, aux = self._rows(plan, batch, at, per_row)
            return DenseStack(grads, losses, after, aux, origin=origin)

        return stack(params, False)

    def _rows(self, plan: Plan, batch: Batch, params: Params, per_row: bool) -> Rows:
        if plan == "loop":
            return loop_rows(self._pure, params, batch, per_row)
        return vmap_rows(
            self._writing,
            params,
            batch,
            per_row,
            cumulative=self._cumulative,
            chunk_size=self.chunk_size,
        )

    def _fused(
        self, batch: Batch, ambient: Ambient, params: Params, per_row: bool, origin: Origin
    ) -> AgainStack:
        def run(batch: Batch, params: Params) -> Forward:
            return forward(self._writing, params, batch, per_row, self._cumulative)

        def again() -> Forward:
            with ambient.again():
                return run(batch, params)

        if per_row and self.chunk_size is not None:
            rows = chunked_rows(run, batch, params, self.chunk_size)
            if rows is not None:
                grads, losses, after, aux = rows
                return DenseStack(grads, losses, after, aux, origin=origin)
        first = run(batch, params)
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

    @property
    def _cumulative(self) -> set[str]:
        return set() if self._model is None else cumulative_means(self._model)

    @property
    def _model(self) -> nn.Module | None:
        return self.loss.model if isinstance(self.loss, ModelLoss) else None

    def _incoming(self, buffers: Tree | None) -> Tree:
        """The buffers before the first row."""
        if self._model is None and buffers:
            raise TypeError(
                "Expected no buffers with a plain loss(params, batch), which cannot take them. "
                "Make the loss with model_loss(model, criterion), or close over them."
            )
        if self._model is None:
            return {}
        own = dict(self._model.named_buffers())
        if buffers is None:
            return {name: b.detach().clone() for name, b in own.items()}
        check_names("buffers", buffers, own)
        return {name: b.detach() for name, b in buffers.items()}

    def _pure(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        if not isinstance(self.loss, ModelLoss):
            return self._writing(params, batch, buffers)
        return self._writing(params, batch, {name: b.clone() for name, b in buffers.items()})

    def _writing(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """The loss in one form, ``(scalar, buffers, aux)``; a module writes into the buffers."""
        if isinstance(self.loss, ModelLoss):
            value, buffers, *rest = self.loss.run(params, batch, buffers)
            aux = rest[0] if rest else None
        elif self.has_aux:
            value, aux = self.loss(params, batch)
        else:
            value, aux = self.loss(params, batch), None
        check_value(value, aux)
        return value, buffers, aux
