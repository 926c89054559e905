"""Every public transform on the fake accelerator: a chain alone, a training step, and its graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _accelerator import DEVICE, Accelerator, ensure_there, module_moved, moved
from _cases import EXTRA, SHAPES, VARIANTS, M, build
from gradfilter.testing._laws import Problem

Case = Callable[[Accelerator], None]
STEPS = 2  # `every`, `late` and `look_sam` run in one and rest in the other


def small() -> nn.Module:
    """Return a model with the two layers that the chains tell apart, head and body."""
    layers = {"body": nn.Linear(6, 4, bias=False), "head": nn.Linear(4, 3)}
    return module_moved(nn.Sequential(OrderedDict(layers)))


def samples() -> Any:
    return moved((torch.randn(8, 6), torch.randint(3, (8,))))


def chain_alone(variant: tuple[str, int], accelerator: Accelerator) -> None:
    """Run the chain on given rows, then in place of the old tensors with a `keep` of the device."""
    problem, update = Problem(SHAPES, M), build(variant)
    params = moved(problem.params())
    state = update.init(params)
    ensure_there(state, "init")
    extra = moved(EXTRA)
    for donate in (False, True):
        rows = problem.given(params, moved(problem.rows(problem.params())))
        extra |= {"keep": torch.ones((), dtype=torch.bool, device=DEVICE)} if donate else {}
        with accelerator.guarded():
            params, state, info = update(params, state, rows, donate=donate, **extra)
        ensure_there((params, state, info), "the result")


def trained(
    make: Callable[[], gf.Transform],
    accelerator: Accelerator,
    *,
    compiled: bool = False,
    steps: int = STEPS,
    model: Callable[[], nn.Module] = small,
    batch: Callable[[], Any] = samples,
    criterion: Any = F.cross_entropy,
    donate: bool = False,
    extra: Any = None,
    microbatches: int | None = 4,
    plan: Any = "fused",
    **options: Any,
) -> None:
    """Train a model for some steps; ``compiled`` traces each step once and runs the graph."""
    module = model()
    loss = gf.model_loss(module, criterion)
    step: Any = gf.train_step(loss, make(), microbatches=microbatches, plan=plan, **options)
    state = step.init(module, seed=0)
    ensure_there(state, "init")
    if compiled:
        step = gf.compile(step, backend="graph")
    for _ in range(steps):
        given = batch()
        with accelerator.guarded():
            state, info = step(state, given, donate=donate, **(extra or {}))
        ensure_there((state, info), "the result")


def _trained(variant: tuple[str, int], compiled: bool, accelerator: Accelerator) -> None:
    extra = moved(EXTRA) if variant[0] == "gate" else {}
    branches = variant[0] in ("every", "late", "look_sam")  # a graph for each
    steps = 1 if compiled and not branches else STEPS
    make = partial(build, variant)
    trained(make, accelerator, compiled=compiled, steps=steps, donate=not compiled, extra=extra)


CASES: dict[str, Case] = {
    f"{name}-{i} {how}": case
    for name, i in VARIANTS
    for how, case in {
        "alone": partial(chain_alone, (name, i)),
        "graph": partial(_trained, (name, i), True),
    }.items()
}

EAGER: dict[str, Case] = {
    f"{name}-{i} eager": partial(_trained, (name, i), False) for name, i in VARIANTS
}
"""Training steps without a graph, for the slow run: "alone" and all plans run without one too."""
