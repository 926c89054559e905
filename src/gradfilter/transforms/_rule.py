"""What every update rule shares: the step count, the learning rate, the sign and L2 decay."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Applied, Offer, Out, Params, State, Transform, Tree
from gradfilter.transforms import _kernel
from gradfilter.transforms._link import check_leaves, check_number, is_off, link
from gradfilter.transforms._schedule import Schedule, as_schedule

# step(gradient, parameter, the leaf's buffers by name, t, lr) -> (update, buffers), t = 1, 2, ...
LeafStep = Callable[
    [Tensor, Tensor, dict[str, Tensor], Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]
]


def new_count(params: Params) -> Tensor:
    """The number of applied steps, 0, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=_tree.device_of(params))


def schedule_value(
    schedule: Schedule, own: Tensor, state: State, extra: dict[str, Any]
) -> tuple[Tensor, State]:
    """The value of a schedule at the caller's ``count=``, else at the link's own count."""
    given = extra.get("count")
    if given is None:
        count = own
    elif isinstance(given, Tensor):
        count = given.to(own.device)
    else:
        count = torch.full_like(own, given)
    return schedule.at(count, state, **{k: v for k, v in extra.items() if k != "count"})


def update_rule(
    name: str,
    lr: float | Schedule,
    buffers: tuple[str, ...],
    step: LeafStep,
    *,
    weight_decay: float = 0.0,
    maximize: bool = False,
    kernel: _kernel.Kernel | None = None,
    cpu_dtypes: Collection[torch.dtype] = _kernel.DTYPES,
) -> Transform:
    """A ``tree -> update`` link from what it does to one leaf.

    Args:
        name: The link's name.
        lr: A number, a 0-d tensor or a Schedule.
        buffers: Names of the tensors kept per leaf, zero at first.
        step: What happens to one leaf after the sign and L2.
        weight_decay: L2, g ← g + λ p. Decoupled decay is the step's own business.
        maximize: Flip the sign, before L2.
        kernel: All of this and the addition to the parameters at once, where there is one.
        cpu_dtypes: What the kernel is right for on a CPU.
    """
    if not isinstance(lr, Schedule):
        check_number(name, "lr", lr, low=0, fix="A Schedule such as cosine(...) fits, too.")
    check_number(name, "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    schedule = as_schedule(lr)

    def init(params: Params) -> State:
        count = new_count(params)
        state = {buffer: _tree.zeros_like(params) for buffer in buffers}
        return {**state, "count": count, "lr": schedule.init(count)}

    def begin(state: State, extra: dict[str, Any]) -> tuple[Tensor, Tensor, State]:
        """The lr of this step, t and the schedule's state after it."""
        value, lr_state = schedule_value(schedule, state["count"], state["lr"], extra)
        return value, state["count"] + 1, lr_state

    def update(
        grads: Tree, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        for buffer in buffers:
            check_leaves(f"{name}: state {buffer!r}", state[buffer], params)
        value, t, lr_state = begin(state, extra)
        updates: Tree = {}
        kept: dict[str, Tree] = {buffer: {} for buffer in buffers}
        for leaf, g in grads.items():
            p = params[leaf]
            g = -g if maximize else g
            g = g if is_off(weight_decay) else g + weight_decay * p
            own = {buffer: state[buffer][leaf] for buffer in buffers}
            updates[leaf], own = step(g, p, own, t, value)
            for buffer in buffers:
                kept[buffer][leaf] = own[buffer]
        return updates, {**kept, "count": t, "lr": lr_state}, {"lr": value}

    formulas = link(name, "tree -> update", update, init=init, publishes=("lr",))
    if kernel is None:
        return formulas

    def apply(
        grads: Any, state: State, params: Params, /, **extra: Any
    ) -> tuple[Any, State | Applied, Out]:
        offer: Offer | None = extra.get("offer")
        own = {buffer: state[buffer] for buffer in buffers}
        if (
            offer is None
            or offer.update is not apply
            or not _kernel.fits(params, (grads, *own.values()), cpu_dtypes)
        ):
            return formulas.update(grads, state, params, **extra)
        value, t, lr_state = begin(state, extra)
        keep, rest = None, {"count": t, "lr": lr_state}
        if "keep" in extra:
            keep = _tree.flag(extra["keep"], t.device)
            rest = _tree.select(keep, rest, {key: state[key] for key in rest})
        new, kept = _kernel.run(kernel, params, grads, own, t, value, keep, offer.donate)
        return Applied(new), Applied({**kept, **rest}), {"lr": value}

    return replace(formulas, update=apply)
