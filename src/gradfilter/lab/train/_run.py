"""A training at work: everything that a step needs, and the state that it replaces."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradfilter as gf
from gradfilter import _tree, diagnostics
from gradfilter._types import State
from gradfilter.grads._ambient import random_state_restored, set_random_state
from gradfilter.grads._grad_function import GradFunction
from gradfilter.lab._crew import Crew
from gradfilter.lab.data._augment import Augment
from gradfilter.lab.data._batches import Order
from gradfilter.lab.data._epochs import steps_until
from gradfilter.lab.data._samples import Data
from gradfilter.lab.data._stream import batches
from gradfilter.lab.train import _totals
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._evaluation import Evaluation, accuracies
from gradfilter.lab.train._memory import peak_memory, watch_memory


@dataclass
class Run:
    """A configuration at work. The state is replaced, never changed, so it is always whole.

    Attributes:
        config: Checked.
        data: On the device.
        model: The structure; the parameters of the training are in ``state``.
        step: One step of the training.
        all_rows: The rows of a whole batch, of which each process computes its part in a step;
            None where there is one.
        order: Which samples a step sees.
        augment: What is done to the images of a step.
        batch_size: Samples of a step, on all processes together.
        total_steps: Length of the training.
        crew: Who trains together.
        state: After ``done`` steps.
        done: Steps done.
        totals: Of the epoch at work.
        skipped: Steps skipped since the start, on the device.
        finite_until: Steps after which the loss of a batch was last finite, on the device; −1 if it
            never was.
        report: What the next step tells a plateau schedule.
        peak_memory: The most that was held during steps, in bytes.
        seconds: Spent in steps since the start.
        epoch_seconds: Spent in steps of this epoch.
    """

    config: TrainConfig
    data: Data
    model: nn.Module
    step: gf.TrainStep
    all_rows: GradFunction | None
    order: Order
    augment: Augment | None
    batch_size: int
    total_steps: int
    crew: Crew
    state: State
    totals: _totals.Totals
    skipped: Tensor
    finite_until: Tensor
    done: int = 0
    report: float | None = None
    peak_memory: float = 0.0
    seconds: float = 0.0
    epoch_seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.data.train.labels.device

    def steps_at(self, epoch: float) -> int:
        """Steps until this many epochs of samples have been seen."""
        return steps_until(epoch, len(self.data.train), self.batch_size)

    @property
    def measured(self) -> State:
        """The parameters and buffers that are evaluated and saved: with --ema, averaged ones."""
        params = self.state["params"]
        if self.config.ema is not None:
            params = _tree.in_dtypes_of(params, gf.ema_of(self.state))
        return {"params": params, "buffers": self.state["buffers"]}

    @property
    def epoch(self) -> float:
        """Epochs of samples that have been seen."""
        return self.done * self.batch_size / len(self.data.train)


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """The mixed precision that the configuration asks for."""
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def advance(
    run: Run,
    until: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Train up to step ``until``, or until ``stopped()``; no step waits for the device.

    Args:
        run: Changed: its state is replaced, step by step.
        until: Not beyond the end of an epoch, whose totals would be mixed with the next one's.
        stopped: Asked before every step.
        tick: Called after every step.
    """
    if run.done >= until:
        return
    config = run.config
    stream = batches(
        run.data.train,
        run.crew.share(run.order(run.done, until)),
        workers=config.workers,
        augment=run.augment,
        seed=config.seed,
        first_step=run.done,
    )
    start = time.perf_counter()
    watch_memory(run.device)
    run.model.train()
    with precision(config, run.device):
        for batch in stream:
            if stopped():
                break
            # The schedule follows the steps done, so that skipped ones do not stretch it.
            run.state, info = run.step(run.state, batch, count=run.done, value=run.report)
            # A schedule forgets what it is told in a step that is skipped. To ask costs a look at
            # the device, once after an epoch.
            if run.report is not None and info["keep"]:
                run.report = None
            run.totals = _totals.plus(run.totals, info)
            run.skipped = run.skipped + ~info["keep"]
            finite = info["loss"].isfinite()
            run.finite_until = torch.where(finite, run.done, run.finite_until)
            run.done += 1
            tick()
    if run.device.type != "cpu":
        torch.accelerator.synchronize(run.device)
    spent = time.perf_counter() - start
    run.peak_memory = max(run.peak_memory, peak_memory(run.device))
    run.seconds += spent
    run.epoch_seconds += spent


def settle(run: Run) -> None:
    """Make one of what several processes measured on their own rows: totals and running statistics.

    Parameters and transforms are the same bits on all at any time. BatchNorm's statistics are those
    of a process's own samples until here, where each becomes their mean.
    """
    if run.crew.size == 1:
        return
    totals = run.crew.mean(torch.stack([*run.totals.values()]))
    run.totals = dict(zip(run.totals, totals.unbind(), strict=True))
    buffers = {
        name: run.crew.mean(buffer) if buffer.is_floating_point() else buffer
        for name, buffer in run.state["buffers"].items()
    }
    run.state = {**run.state, "buffers": buffers}


def evaluation(run: Run) -> Evaluation:
    """Measure a training where it stands; changes nothing. Several processes settle before."""
    numbers = dict(zip(run.totals, torch.stack([*run.totals.values()]).tolist(), strict=True))
    seen = numbers["steps"] * run.batch_size
    with precision(run.config, run.device):
        quality = accuracies(run.model, run.measured, run.data, run.config.workers)
        agreement = _agreement(run)
    return Evaluation(
        step=run.done,
        epoch=run.epoch,
        samples=run.done * run.batch_size,
        skipped=int(run.skipped),
        seconds=run.seconds,
        samples_per_second=seen / run.epoch_seconds if run.epoch_seconds else math.nan,
        peak_memory=run.peak_memory if run.done else math.nan,
        **quality,
        **agreement,
        **_totals.means(numbers, run.config),
    )


def _agreement(run: Run) -> dict[str, float]:
    """Who agrees with whom in the batch of the next step, without augmentation."""
    if run.all_rows is None:
        return {"cosine": math.nan, "noise_scale": math.nan}
    chosen = run.order(run.done, run.done + 1)[0]
    samples = run.data.train
    batch = samples.images.fetch(chosen), samples.labels[chosen.to(run.device)]
    with random_state_restored(run.device):  # dropout as the next step will have it
        set_random_state(run.state["random"], run.device)
        rows = run.all_rows(run.state["params"], batch, buffers=run.state["buffers"])
        scale = diagnostics.noise_scale(rows, run.batch_size // len(rows)).samples
        cosine = diagnostics.agreement(rows)
    return {"cosine": cosine.item(), "noise_scale": scale.item()}
