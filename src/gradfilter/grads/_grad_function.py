"""From a loss to a function of parameters and batch: checks, the choice of plan, recomputation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._ambient import Ambient, set_random_state
from gradfilter.grads._batch import check_device, check_params, split
from gradfilter.grads._dense import DenseStack, Origin
from gradfilter.grads._loop import Rows, loop_rows
from gradfilter.grads._loss import ModelLoss, check_names
from gradfilter.grads._running_stats import cumulative_means
from gradfilter.grads._vmap import vmap_rows

Plan = Literal["auto", "loop", "vmap"]


@dataclass(frozen=True, eq=False)
class GradFunction:
    """``(params, batch, *, buffers=None) -> GradStack``, made by `microbatch_grads`."""

    loss: Callable[..., Any]
    microbatches: int | None
    has_aux: bool
    plan: Plan
    chunk_size: int | None

    def __call__(self, params: Params, batch: Any, *, buffers: Tree | None = None) -> DenseStack:
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
        incoming = self._incoming(buffers)
        plan = self._pick_plan(params, tensors)
        ambient = Ambient.now(_tree.device_of(params), self._model)

        def run(plan: Plan, params: Params, per_row: bool) -> Rows:
            params = {name: p.detach() for name, p in params.items()}
            if plan == "loop":
                return loop_rows(self._pure, params, tensors, rebuild, incoming, per_row)
            return vmap_rows(
                self._writing,
                params,
                tensors,
                rebuild,
                incoming,
                per_row,
                cumulative=set() if self._model is None else cumulative_means(self._model),
                chunk_size=self.chunk_size,
            )

        def evaluate(elsewhere: Params, per_row: bool) -> DenseStack:
            with ambient.again():
                rows = run(plan, elsewhere, per_row)
            return stack(rows, params if per_row else elsewhere)

        def stack(rows: Rows, base: Params) -> DenseStack:
            grads, losses, after, aux = rows
            origin = Origin(len(losses), base, evaluate)
            return DenseStack(grads, losses, after, aux, origin=origin)

        if self.plan != "auto" or plan == "loop":
            return stack(run(plan, params, False), params)
        try:
            return stack(run(plan, params, False), params)
        except Exception as refusal:
            # The loop says whether the loss or only vmap was at fault, on the same random numbers.
            plan = "loop"
            set_random_state(ambient.random, ambient.device)
            try:
                result = stack(run(plan, params, False), params)
            except Exception as fault:
                raise fault from None
            reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
            warnings.warn(
                f'Fell back to plan "loop", because vmap refused the loss: {reason} Pass '
                'plan="loop" to choose it outright.',
                stacklevel=2,
            )
            return result

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

    def _pick_plan(self, params: Params, tensors: list[Tensor]) -> Plan:
        if self.plan != "auto":
            return self.plan
        # Measured by benchmarks/fused_vs_looped.py: on a CPU a pass over one large microbatch keeps
        # the cores busy, so vmap pays only where the rows are many and small.
        rows, samples = tensors[0].shape[:2]
        work = samples * sum(p.numel() for p in params.values())
        on_cpu = _tree.device_of(params).type == "cpu"
        return "loop" if on_cpu and (rows < 8 or work > 30_000_000) else "vmap"

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
        _check_value(value, aux)
        return value, buffers, aux


def _check_value(value: Any, aux: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected the loss to be a scalar tensor, found {type(value).__name__}. A loss that "
            "returns (scalar, aux) needs has_aux=True."
        )
    if value.ndim:
        raise ValueError(
            f"Expected a scalar loss per microbatch, found shape {tuple(value.shape)}. Average "
            'over the samples: a criterion with reduction="none" needs .mean().'
        )
    if not value.requires_grad:
        raise ValueError(
            "Expected a loss that depends on the parameters, found one without a gradient. Is it "
            "detached, computed under no_grad or inference_mode, or are other parameters used than "
            "those passed in?"
        )
    strangers = [] if aux is None else [x for x in _tree.leaves(aux) if not isinstance(x, Tensor)]
    if strangers:
        raise TypeError(
            f"Expected aux as a tree of tensors, found {type(strangers[0]).__name__}. Return "
            "tensors, which are stacked over the rows."
        )
