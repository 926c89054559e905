"""The whole training step as one pure function of one state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from gradfilter import _tree
from gradfilter._info import Info
from gradfilter._types import Kind, Params, State, Transform, Tree
from gradfilter.grads._batch import more_than_a_batch
from gradfilter.grads._call_context import random_state, random_state_restored, set_random_state
from gradfilter.grads._loss import extract
from gradfilter.grads._microbatch import GradFunction, Plan, microbatch_grads, per_sample_grads
from gradfilter.transforms._chain import check_state, check_tree, not_a_transform


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
        self, state: TrainState, batch: Any, *more: Any, donate: bool = False, **extra: Any
    ) -> tuple[TrainState, Info]:
        """Run one step; the same state and batch always give the same result.

        Args:
            state: The state from `init` or the step before. It is not changed.
            batch: See `microbatch_grads`.
            *more: Not allowed; for the error message.
            donate: True to write parameters and transform states into their old tensors.
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
        device = _tree.device_of(state["params"])
        with random_state_restored(device):
            set_random_state(state["random"], device)
            rows = self.grads_of(state["params"], batch, buffers=state["buffers"])
            # A donated update overwrites the parameters, from which a loss of NaN has to be asked.
            loss = rows.mean_loss() if donate else None
            params, transforms, info = self.update(
                state["params"], state["transforms"], rows, donate=donate, **extra
            )
            random = random_state(device)  # after the draws of the transforms
        loss = rows.mean_loss() if loss is None else loss
        state = {
            "params": params,
            "buffers": rows.buffers,
            "transforms": transforms,
            "random": random,
        }
        aux = {} if rows.aux is None else {"aux": rows.aux}
        return state, Info({"loss": loss, **aux, **info})


def train_step(
    loss: Callable[..., Any],
    update: Transform,
    *more: Any,
    has_aux: bool = False,
    microbatches: int | None = None,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float = 0.25,
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

    Raises:
        TypeError: ``update`` does not take rows or does not end in an update.

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
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "plan": plan,
        "chunk_size": chunk_size,
        "memory_budget": memory_budget,
    }
    grads_of = (
        per_sample_grads(loss, **options)
        if microbatches is None
        else microbatch_grads(loss, microbatches, **options)
    )
    return TrainStep(grads_of, update)


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
