"""One training of a comparison: a method, its state and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import gradfilter as gf
from gradfilter._types import State
from gradfilter.lab._crew import ALONE, Crew
from gradfilter.lab._digits import CLASSES, Digits, stream

HIDDEN = 256
LR = 0.05
MOMENTUM = 0.9
MICROBATCHES = 8
BATCH_SIZE = MICROBATCHES * CLASSES


@dataclass(frozen=True)
class Method:
    """How the rows of a batch become one gradient.

    Attributes:
        name: Short, for files and metrics.
        label: For people.
        reducer: The link that takes rows and gives a tree.
        microbatches: Rows per batch; None for one row per sample.
    """

    name: str
    label: str
    reducer: gf.Transform
    microbatches: int | None


@dataclass
class Training:
    """A method at work. The state is replaced, never changed, so it is whole at any moment."""

    method: Method
    seed: int
    model: nn.Module
    step: gf.TrainStep
    state: State
    batches: Tensor  # (steps, BATCH_SIZE)
    done: int = 0
    seconds: float = 0.0
    rows: int = 0
    accepted: Tensor | int = 0  # rows
    skipped: Tensor | int = 0
    losses: list[Tensor] = field(default_factory=list)


def mlp(seed: int) -> nn.Module:
    """MLP 64-256-256-10; a seed gives the same parameters on every device."""
    with torch.random.fork_rng():
        torch.manual_seed(int(stream(seed, "init").integers(2**63)))
        return nn.Sequential(
            nn.Linear(64, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
        )


def begin(method: Method, seed: int, data: Digits, batches: Tensor, crew: Crew = ALONE) -> Training:
    """A training before its first step.

    Args:
        method: What sets it apart.
        seed: Of the initial parameters.
        data: To be trained on.
        batches: Indices of the samples of every step, on the device to train on. (steps, N)
        crew: Who takes part. A method of fewer microbatches than processes has one on each.
    """
    model = mlp(seed).to(batches.device, data.images.dtype)
    batches = crew.share(batches)
    update = gf.chain(crew.spread(method.reducer), gf.sgd(LR, momentum=MOMENTUM))
    loss = gf.model_loss(model, nn.functional.cross_entropy)
    here = None if method.microbatches is None else max(1, method.microbatches // crew.size)
    step = gf.train_step(loss, update, microbatches=here)
    state = step.init(model, seed=0)
    # What is loaded at a first step is not what a step costs; its results are not used.
    step(state, (data.images[batches[0]], data.labels[batches[0]]))
    return Training(method, seed, model, step, state, batches)


def advance(
    training: Training,
    data: Digits,
    until: int,
    *,
    stopped: Callable[[], bool],
    tick: Callable[[], None],
) -> None:
    """Train up to step ``until``, or until ``stopped()``; no step waits for the device."""
    start = time.perf_counter()
    while training.done < until and not stopped():
        chosen = training.batches[training.done]
        training.state, info = training.step(
            training.state, (data.images[chosen], data.labels[chosen])
        )
        accepted = info.get(training.method.reducer.metric("accepted"))
        # A method that publishes none takes every row.
        training.rows += 1 if accepted is None else len(accepted)
        training.accepted += 1 if accepted is None else accepted.sum()
        training.skipped += ~info["keep"]
        training.losses.append(info["loss"])
        training.done += 1
        tick()
    if data.images.device.type != "cpu":
        torch.accelerator.synchronize(data.images.device)
    training.seconds += time.perf_counter() - start
