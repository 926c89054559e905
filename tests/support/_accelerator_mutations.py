"""Faults planted on purpose: what the other cases check with has to find each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradfilter as gf
from _accelerator import Accelerator, ensure_there
from _accelerator_chains import Case, samples, small, trained
from gradfilter.grads.fused.overrides._registry import OVERRIDES

Fault = Callable[[Tensor], Any]
FAULTS: dict[str, tuple[Fault, str]] = {
    "item": (lambda x: x * x.sum().item(), "waits for the value of a tensor"),
    "if": (lambda x: x if x.sum() > 0 else -x, "waits for the value of a tensor"),
    "constant": (lambda x: x * torch.ones(()), "mixes .'accel', 'cpu'"),
    "copy": (lambda x: x + x.sum().cpu().to(x.device), "mixes .'accel', 'cpu'"),
    "list": (lambda x: x * torch.tensor(0.5, device=x.device), "accel"),
}
LEFT = r"are on the CPU"


def in_a_transform(fault: Fault, compiled: bool, accelerator: Accelerator) -> None:
    """Plant a fault into a transform of the user."""

    def update(grads: Any, state: Any, params: Any, /, **extra: Any) -> Any:
        return {name: fault(g) for name, g in grads.items()}, state, {}

    faulty = gf.transform("faulty", "tree -> tree", update)
    make = lambda: gf.chain(gf.mean_rows(), faulty, gf.sgd(0.1))
    trained(make, accelerator, compiled=compiled)


def in_an_override(fault: Fault, compiled: bool, accelerator: Accelerator) -> None:
    """Plant a fault into the override of linear layers."""
    sound = OVERRIDES[F.linear]

    def override(host: Any, *args: Any, **kwargs: Any) -> Any:
        found = sound(host, *args, **kwargs)
        return host.level.lift_call(fault, host.level.lower(found))

    make = lambda: gf.chain(gf.mean_rows(), gf.sgd(0.1))
    with mock.patch.dict(OVERRIDES, {F.linear: override}):
        trained(make, accelerator, compiled=compiled)


def in_the_step(fault: Fault, compiled: bool, accelerator: Accelerator) -> None:
    """Plant a fault into a step of the user."""
    model = small()
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=4)

    def faulty(state: Any, batch: Any) -> Any:
        new, info = step(state, batch)
        return new, {"loss": fault(info["loss"])}

    run: Any = gf.compile(faulty, backend="graph") if compiled else faulty
    state = step.init(model)
    with accelerator.guarded():
        ensure_there(run(state, samples()), "the result")


def left_in_a_state(compiled: bool, accelerator: Accelerator) -> None:
    """Make the state of a transform on the CPU."""
    count = gf.transform(
        "count",
        "tree -> tree",
        lambda grads, state, params, /, **extra: (grads, {"t": state["t"] + 1}, {}),
        init=lambda params: {"t": torch.zeros(())},
    )
    trained(lambda: gf.chain(gf.mean_rows(), count, gf.sgd(0.1)), accelerator, compiled=compiled)


def caught(plant: Any, expected: str, accelerator: Accelerator) -> None:
    """Refuse a planted fault that nothing finds."""
    try:
        plant(accelerator)
    except Exception as error:
        if not re.search(expected, str(error)):
            raise
    else:
        raise AssertionError("the planted fault was not found")


def no_answer_too_many(accelerator: Accelerator) -> None:
    """Expect a read that does not happen."""
    with accelerator.guarded([1.0]):
        nn.Linear(1, 1)


PLACES = {
    "a transform": in_a_transform,
    "an override": in_an_override,
    "the step": in_the_step,
}
CASES: dict[str, Case] = {
    **{
        f"{name} in {place} {how}": partial(caught, partial(plant, fault, compiled), expected)
        for place, plant in PLACES.items()
        for name, (fault, expected) in FAULTS.items()
        for how, compiled in {"eager": False, "graph": True}.items()
    },
    "state on the CPU eager": partial(caught, partial(left_in_a_state, False), LEFT),
    "state on the CPU graph": partial(caught, partial(left_in_a_state, True), LEFT),
    "a read fewer than expected": partial(caught, no_answer_too_many, "fewer than expected"),
}
