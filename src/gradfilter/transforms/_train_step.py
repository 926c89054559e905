"""The whole training step as one pure function of one state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._info import Info
from gradfilter._overlap import copied_where_shared
from gradfilter._shards import is_sharded
from gradfilter._types import Kind, Params, State, Transform, Tree
from gradfilter.grads._batch import MarkedBatch, cut, mark_samples, more_than_a_batch
from gradfilter.grads._call_context import random_state, random_state_restored, set_random_state
from gradfilter.grads._loss import extract
from gradfilter.grads._microbatch import GradFunction, Plan, microbatch_grads, per_sample_grads
from gradfilter.grads._row_parts import dense_rows, join_stacks
from gradfilter.grads._stack import ComputedStack, DenseStack
from gradfilter.transforms._chain import check_state, check_tree, not_a_transform, row_part
from gradfilter.transforms._streaming import ReducedRows


class TrainState(TypedDict):
    """The state of a training: a dict of trees of tensors, as `state_dict` flattens it.

    Attributes:
        params: The trainable parameters.
        buffers: The buffers of the module.
        transforms: The state of the chain.
        random: The state of each random number generator that the steps draw from.
    """

    params: Params
    buffers: Tree
    transforms: State
    random: Tree


@dataclass(frozen=True, eq=False)
class TrainStep:
    """``step(state, batch, **extra) -> (state, info)``, made by `train_step`."""

    grads_of: GradFunction
    update: Transform
    rows_at_once: int | None = None

    def init(self, model: nn.Module | Params, *, seed: int | None = None) -> TrainState:
        """Return the first state: a tree of tensors (params, buffers, transforms, random state).

        Args:
            model: A module, or the parameters of a plain loss.
            seed: The seed of the steps' random numbers; None takes the present state of torch's
                generators. In both cases neither this call nor the steps change those.
        """
        if isinstance(model, nn.Module):
            params, buffers = extract(model)
        else:
            check_tree("train_step", model, expected="a module, or its parameters")
            params, buffers = {name: p.detach().clone() for name, p in model.items()}, {}
        device = _tree.device_of(params)
        random = random_state(device)
        if seed is not None:
            random = {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in random}
        return {
            "params": params,
            "buffers": buffers,
            "transforms": self.update.init(params),
            "random": random,
        }

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        *more: Any,
        donate: bool = False,
        reference_batch: Any = None,
        sample_weights: Tensor | None = None,
        groups: Tensor | None = None,
        **extra: Any,
    ) -> tuple[TrainState, Info]:
        """Run one step; the same state and batch always give the same result.

        Args:
            state: The state from `init` or the step before. It is not changed.
            batch: See `microbatch_grads`.
            *more: Not allowed; for the error message.
            donate: True to write parameters and transform states into their old tensors.
            reference_batch: Samples whose mean gradient `reference_filter` follows, at the same
                parameters: a batch of any size, of the same structure. One more backward pass; what
                it does to buffers is discarded. It comes after the rows, whose random numbers so do
                not depend on it; with rows in parts before them, because the first part needs it.
            sample_weights: See `GradFunction`. The name ``weights`` is that of the weights of rows
                that a reducer publishes.
            groups: See `GradFunction`; not with ``rows_at_once``.
            **extra: Keywords for the transforms: ``keep``, ``count``, ``value``.

        Returns:
            The new state, and ``info`` with ``loss`` () (the mean over the rows), ``keep`` and the
            metrics of the transforms. With a loss that has aux, ``info["aux"]`` is its aux, a tree
            whose leaves have a leading axis M: the only entry that may not be a tensor. A skipped
            step still advances buffers and random state.

        Raises:
            TypeError: The state is not a dict, for example the model, or a result not unpacked.
            ValueError: It is the state of another object.
        """
        if more:
            raise more_than_a_batch("step(state, batch)", "step(state, (x, y))", more)
        check_state(
            "train_step",
            "step",
            state,
            TrainState.__annotations__,
            "Begin with state = step.init(model), then write state, info = step(state, batch).",
        )
        batch = mark_samples(batch, sample_weights, groups, self.grads_of.microbatches)
        device = _tree.device_of(state["params"])
        with random_state_restored(device):
            set_random_state(state["random"], device)
            rows = self._rows(state, batch, extra, reference_batch)
            followed = isinstance(rows, ReducedRows) and rows.row_part.follows_reference
            if reference_batch is not None and not followed:
                # After the rows, whose draws do not depend on it.
                extra["reference"] = self._reference(state, reference_batch)
            # A donated update overwrites the parameters, from which a loss of NaN has to be asked,
            # and which aux and buffers may show.
            of_loss = copied_where_shared(_of_loss(rows), state["params"]) if donate else None
            params, transforms, info = self.update(
                state["params"], state["transforms"], rows, donate=donate, **extra
            )
            random = random_state(device)  # after the draws of the transforms
        loss, aux, buffers = of_loss or _of_loss(rows)
        state = {
            "params": params,
            "buffers": buffers,
            "transforms": transforms,
            "random": random,
        }
        shown = {} if aux is None else {"aux": aux}
        return state, Info({"loss": loss, **shown, **info})

    def _rows(
        self, state: TrainState, batch: Any, extra: dict[str, Any], reference_batch: Any
    ) -> ComputedStack | DenseStack | ReducedRows:
        """Return the rows of the batch, or what the chain has made of them part by part."""
        params, buffers = state["params"], state["buffers"]
        if isinstance(batch, MarkedBatch) and batch.groups is not None:
            self._refuse_parts()
            return self.grads_of(params, batch, buffers=buffers)
        cuts = self.grads_of.parts(batch)
        if self.rows_at_once is not None:
            of_samples = self.grads_of.microbatches is None
            cuts = [
                piece
                for part, count in cuts
                for piece in cut(part, None if of_samples else count, self.rows_at_once)
            ]
        parts = [(part, self.grads_of.with_rows(count)) for part, count in cuts]
        if len(parts) == 1:
            return self.grads_of(params, batch, buffers=buffers)
        of_chain = row_part(self.update)
        if of_chain is None:  # the chain compares rows of different parts
            held: list[DenseStack] = []
            for part, grads_of in parts:
                held.append(dense_rows(grads_of(params, part, buffers=buffers)))
                buffers = held[-1].buffers
            return join_stacks(held)
        if reference_batch is not None and of_chain.follows_reference:
            extra["reference"] = self._reference(state, reference_batch)
        reduced = ReducedRows(of_chain, state["transforms"], params, extra, buffers)
        for part, grads_of in parts:
            rows = grads_of(params, part, buffers=reduced.buffers)
            with torch.no_grad():
                reduced.add(rows)
            del rows  # before the next part is computed
        return reduced

    def _reference(self, state: TrainState, batch: Any) -> Tree:
        """Return the gradient that the rows of a step follow."""
        return mean_gradient(self.grads_of, state["params"], batch, state["buffers"])

    def _refuse_parts(self) -> None:
        """Refuse groups in parts: the samples of a row may be anywhere in the batch."""
        if self.rows_at_once is not None:
            raise ValueError(
                f"train_step: expected rows_at_once=None with groups=, found {self.rows_at_once}: "
                "the samples of a row may be anywhere in the batch. Sort them into microbatches "
                "of equal sizes, or compute all rows at once."
            )


def mean_gradient(grads_of: GradFunction, params: Params, batch: Any, buffers: Tree | None) -> Tree:
    """Return the gradient of the mean loss of a batch, as one row."""
    if any(map(is_sharded, params.values())):
        raise ValueError(
            "Expected whole parameters with reference_batch=, found sharded ones (DTensor), whose "
            "gradient is a sum over all ranks. Give reference_filter a gradient, sharded like the "
            'parameters, or "average".'
        )
    rows = replace(grads_of, microbatches=1)(params, batch, buffers=buffers)
    gradient = rows.combine(torch.ones(1, device=_tree.device_of(params)))
    rows.release()
    return gradient


def _of_loss(rows: ComputedStack | DenseStack | ReducedRows) -> tuple[Tensor, Any, Tree]:
    """Return the mean loss of rows, their aux and the new buffers."""
    loss = rows.mean_loss()
    assert loss is not None  # rows of a batch always have their losses
    return loss, rows.aux, rows.buffers


def train_step(
    loss: Callable[..., Any],
    update: Transform,
    *more: Any,
    has_aux: bool = False,
    microbatches: int | None = None,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float | None = None,
    rows_at_once: int | None = None,
    uneven: bool = False,
) -> TrainStep:
    """Combine loss, gradients and update into one object with one state to checkpoint.

    Args:
        loss: The result of `model_loss`, or a pure ``loss(params, batch) -> scalar``.
        update: A chain that takes rows and ends in an update.
        *more: Not allowed; for the error message.
        has_aux: True if ``loss`` returns ``(scalar, aux)``, as in `microbatch_grads`; with
            `model_loss`, set it there. The aux of a step is ``info["aux"]``.
        microbatches: M rows per batch; None for one row per sample.
        plan: See `microbatch_grads`.
        chunk_size: See `microbatch_grads`.
        memory_budget: See `microbatch_grads`.
        rows_at_once: The number of rows of a physical batch; None for all rows. The batch is cut,
            and a pass runs over each part. If every transform up to the reducer acts row by row
            (`finite_filter`, `clip_per_row`, `mean_rows`), the step holds one gradient; otherwise
            all rows, because the chain compares them. The result is that of one part, up to
            rounding and to which random numbers a dropout layer draws.
        uneven: True for batches whose size M need not divide: see `microbatch_grads`.

    Raises:
        TypeError: ``update`` does not take rows or does not end in an update.
        ValueError: ``rows_at_once`` is not a whole number >= 1.

    Examples:
        >>> import torch, gradfilter as gf
        >>> model = torch.nn.Linear(2, 2)
        >>> loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
        >>> step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=2)
        >>> state = step.init(model)
        >>> state, info = step(state, (torch.randn(8, 2), torch.arange(8) % 2))
        >>> sorted(info)
        ['keep', 'loss', 'sgd/lr']
    """
    if more or not isinstance(update, Transform):
        raise _no_chain(update, more)
    if Kind.ROWS_TO_UPDATE not in update.kinds:
        raise TypeError(
            f"train_step: expected a chain from rows to an update, found {update.kind!r}. Start "
            "with mean_rows() or a filter, and end with an update rule such as sgd(lr)."
        )
    whole = isinstance(rows_at_once, int) and not isinstance(rows_at_once, bool)
    if rows_at_once is not None and not (whole and rows_at_once >= 1):
        raise ValueError(
            "train_step: expected rows_at_once as a whole number of rows >= 1 or None, found "
            f"{rows_at_once!r}. None computes all rows in one pass."
        )
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "plan": plan,
        "chunk_size": chunk_size,
        "memory_budget": memory_budget,
    }
    grads_of = (
        per_sample_grads(loss, **options)
        if microbatches is None
        else microbatch_grads(loss, microbatches, uneven=uneven, **options)
    )
    return TrainStep(grads_of, update, rows_at_once)


def _no_chain(update: Any, more: tuple[Any, ...]) -> TypeError:
    """Return the error for an argument that is not one chain."""
    transforms = [part for part in (update, *more) if isinstance(part, Transform)]
    if more and len(transforms) == 1 + len(more):
        names = ", ".join(f"{part.name or 'chain'}(...)" for part in transforms)
        return TypeError(
            f"train_step: expected train_step(loss, update), found {len(transforms)} transforms. "
            f"Make them one: train_step(loss, chain({names}), microbatches=8)."
        )
    stranger = next(part for part in (update, *more) if not isinstance(part, Transform))
    if isinstance(stranger, int) and more:
        return TypeError(
            f"train_step: expected train_step(loss, update, microbatches=...), found {stranger} as "
            f"an argument by place. Write microbatches={stranger}."
        )
    return not_a_transform(stranger, "train_step")
