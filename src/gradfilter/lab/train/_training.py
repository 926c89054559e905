"""A training in progress: its state, one step, and the totals of an epoch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradfilter as gf
from gradfilter import _tree, diagnostics
from gradfilter._types import State
from gradfilter.distributed._ranks import Ranks
from gradfilter.grads._call_context import random_state_restored, set_random_state
from gradfilter.grads._microbatch import GradFunction
from gradfilter.lab.data._batches import Augment, Order, batches, steps_until
from gradfilter.lab.data._samples import Data
from gradfilter.lab.train._accuracies import accuracies
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._train_config import TrainConfig

# --- Peak memory ---


def watch_memory(device: torch.device) -> None:
    """Start to record peak memory on a GPU; that of a process is always recorded."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Return the largest number of bytes held: on a GPU since `watch_memory`, else by the process.

    NaN if the operating system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# --- Totals of an epoch, kept on the device until it ends ---


SUMS = (
    *("loss", "losses", "rows", "accepted", "steps", "clipped_rows", "clipped_units"),
    *("gap", "gaps"),
)
CLIPPED_ROWS = tuple(
    f"{name}/clipped_fraction" for name in ("clip_per_row", "budget_clip", "centered_clip")
)
CLIPS = ("clip_per_row", "clip_quantile", "clip_smallest", "budget_clip", "centered_clip")
"""Options that publish one of these."""
GIVEN_UP = "spike_skip"
"""The transform that may give up."""
LATEST = ("lr", "rho")
WATCHED = (
    *("noise_scale", "cosine", "effective_rows", "accepted_fraction"),
    *("norm_10", "norm_50", "norm_90", "loss_10", "loss_50", "loss_90"),
)
"""Metrics of `watch`, of its last measurement in the epoch."""

Totals = dict[str, Tensor]
"""One number per name, all on the device."""


def no_totals(device: torch.device) -> Totals:
    """Return the totals before the first step of an epoch."""
    narrow = torch.zeros((), device=device)
    zero = narrow.to(_tree.sum_dtype(narrow))
    unknown = torch.full_like(zero, torch.nan)
    watched = {f"watch_{name}": unknown for name in WATCHED}
    return dict.fromkeys((*SUMS, *LATEST), zero) | watched


def add_to_totals(totals: Totals, info: Mapping[str, Tensor]) -> Totals:
    """Add one step to the totals, without waiting for the device.

    Args:
        totals: Totals before the step.
        info: Numbers that the step returned.
    """
    found = {name.split("/")[-1]: value for name, value in info.items()}
    accepted = found.get("accepted")
    # A reducer that does not publish "accepted" uses every row.
    one = torch.ones_like(totals["steps"])
    # A loss is not finite in a step that a filter skipped, or in the last step of a training.
    finite = info["loss"].isfinite()
    new = {
        "loss": torch.where(finite, info["loss"], 0.0),
        "losses": finite,
        "rows": one if accepted is None else one * accepted.numel(),
        "accepted": one if accepted is None else accepted.sum(),
        "steps": one,
        "clipped_rows": next((info[n] for n in CLIPPED_ROWS if n in info), None),
        "clipped_units": info.get("agc_clip/clipped_fraction"),
        "gap": found.get("surrogate_gap"),
        "gaps": one if "surrogate_gap" in found else None,  # --look-sam: in some of the steps
        "lr": found["lr"],
        "rho": found.get("rho"),
    }
    sums = {n: totals[n] + v for n in SUMS if (v := new[n]) is not None}
    latest = {n: v.to(totals[n].dtype) for n in LATEST if (v := new[n]) is not None}
    keys = ((f"watch_{name}", info.get(f"watch/{name}")) for name in WATCHED)
    watched = {name: v.to(totals[name].dtype) for name, v in keys if v is not None}
    return totals | sums | latest | watched


def means_of_totals(totals: Mapping[str, float], config: TrainConfig) -> dict[str, float]:
    """Compute the means of an epoch; NaN for quantities that the run does not have.

    Args:
        totals: Totals of the epoch, as numbers.
        config: Settings of the run, which decide what it has.
    """
    steps = totals["steps"] or math.nan
    rho = math.nan if config.sam is None else config.sam
    if config.rho_schedule != "constant":
        rho = totals["rho"] * steps / steps  # NaN without a step
    clipped = any(getattr(config, name) not in (None, False) for name in CLIPS)
    return {
        "loss": totals["loss"] / (totals["losses"] or math.nan),
        "accepted": totals["accepted"] / (totals["rows"] or math.nan),
        "clipped_rows": _value_or_nan(clipped, totals["clipped_rows"] / steps),
        "clipped_units": _value_or_nan(bool(config.agc), totals["clipped_units"] / steps),
        "surrogate_gap": _value_or_nan(
            config.sam is not None, totals["gap"] / (totals["gaps"] or math.nan)
        ),
        "lr": totals["lr"] * steps / steps,
        "rho": rho,
        **{f"watch_{name}": totals[f"watch_{name}"] for name in WATCHED},
    }


def _value_or_nan(has: bool, value: float) -> float:
    return value if has else math.nan


# --- The training ---


@dataclass
class Training:
    """A training in progress. Its state is replaced, never changed, so it is always consistent.

    Attributes:
        config: Checked settings.
        data: The data set, on the device.
        model: The structure; the parameters of the training are in ``state``.
        step: The train step.
        all_rows: Computes the rows of a whole batch, of which each process computes its part in a
            step; None with one process.
        order: Order of the samples.
        augment: Augmentation of the images of a step, or None.
        batch_size: Samples per step, over all processes.
        total_steps: Length of the training, in steps.
        ranks: The processes that train together.
        state: State after ``done`` steps.
        reference: The images and labels whose gradient --reference clean follows.
        done: Steps done.
        totals: Totals of the current epoch.
        skipped: Steps skipped since the start, on the device.
        finite_until: Step after which the loss of a batch was last finite, on the device; −1 if it
            never was.
        report: Value that the next step reports to a plateau schedule.
        peak_memory: Largest number of bytes held during steps.
        seconds: Time spent in steps since the start.
        epoch_seconds: Time spent in steps of this epoch.
    """

    config: TrainConfig
    data: Data
    model: nn.Module
    step: gf.TrainStep | gf.CompiledStep
    all_rows: GradFunction | None
    order: Order
    augment: Augment | None
    batch_size: int
    total_steps: int
    ranks: Ranks
    state: State
    totals: Totals
    skipped: Tensor
    finite_until: Tensor
    reference: tuple[Tensor, Tensor] | None = None
    done: int = 0
    report: float | None = None
    peak_memory: float = 0.0
    seconds: float = 0.0
    epoch_seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        """Return the device of the training."""
        return self.data.train.labels.device

    def take_step(
        self, batch: Any, count: int, report: float | None = None
    ) -> tuple[gf.TrainState, gf.Info]:
        """Return the state and the info after one more step.

        Args:
            batch: The samples.
            count: The number of steps before this one, for schedules.
            report: The value for a plateau schedule.
        """
        clean = self.reference
        if not self.config.compile:
            return self.step(self.state, batch, count=count, value=report, reference_batch=clean)
        # A graph fixes Python numbers, and takes tensors as inputs.
        at = torch.full((), count, device=self.device)
        value = None if report is None else torch.full((), report, device=self.device)
        return self.step(self.state, batch, count=at, value=value, reference_batch=clean)

    def steps_at(self, epoch: float) -> int:
        """Return the number of steps after which `epoch` epochs of samples have been seen."""
        return steps_until(epoch, len(self.data.train), self.batch_size)

    @property
    def measured(self) -> State:
        """Return the parameters and buffers to evaluate and save: with --ema, the averaged ones.

        With --schedule-free and --msam, they are not those at which the gradients are taken.
        """
        params = gf.evaluated_params(self.state["params"], self.state)
        if self.config.ema is not None:
            params = _tree.in_dtypes_of(params, gf.ema_of(self.state))
        return {"params": params, "buffers": self.state["buffers"]}

    @property
    def has_given_up(self) -> bool:
        """Return whether --spike-skip has given up. It reads the state, so it waits for steps."""
        given = self.state["transforms"].get(GIVEN_UP)
        return given is not None and bool(given["gave_up"])

    @property
    def epoch(self) -> float:
        """Return the number of epochs of samples that have been seen."""
        return self.done * self.batch_size / len(self.data.train)


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager for the configured mixed precision."""
    if config.amp == "none":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def advance(
    run: Training,
    until: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Train up to step ``until``, or until ``stopped()``; no step waits for the device.

    Args:
        run: The training; each step replaces its state.
        until: Last step, not beyond the end of the epoch: totals must not mix two epochs.
        stopped: Called before each step; True stops.
        tick: Called after each step.
    """
    if run.done >= until:
        return
    config = run.config
    stream = batches(
        run.data.train,
        _own_part(run.order(run.done, until), run.ranks),
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
            run.state, info = run.take_step(batch, run.done, run.report)
            # A schedule ignores the report in a skipped step. Checking waits for the device, once
            # per epoch.
            if run.report is not None and info["keep"]:
                run.report = None
            run.totals = add_to_totals(run.totals, info)
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


def _own_part(batches: Tensor, ranks: Ranks) -> Tensor:
    """Return this process's part of every batch, rank by rank. (steps, N) -> (steps, N/W)."""
    return batches.reshape(len(batches), ranks.size, -1)[:, ranks.rank]


def sync_ranks(run: Training) -> None:
    """Combine what several processes measured on their own rows: totals and running statistics.

    Parameters and transform states are always bitwise equal on all processes. The statistics of
    BatchNorm come from the samples of one process; here each becomes the mean over processes.
    """
    if run.ranks.size == 1:
        return
    totals = run.ranks.total(torch.stack([*run.totals.values()])) / run.ranks.size
    run.totals = dict(zip(run.totals, totals.unbind(), strict=True))
    buffers = {
        name: run.ranks.total(buffer) / run.ranks.size if buffer.is_floating_point() else buffer
        for name, buffer in run.state["buffers"].items()
    }
    run.state = {**run.state, "buffers": buffers}


def evaluation(run: Training) -> Evaluation:
    """Measure a training at its current step; changes nothing. Call `sync_ranks` before."""
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
        **means_of_totals(numbers, run.config),
    )


def _agreement(run: Training) -> dict[str, float]:
    """Compute the agreement of the rows in the next step's batch, without augmentation."""
    if run.all_rows is None:
        return {"cosine": math.nan, "noise_scale": math.nan}
    chosen = run.order(run.done, run.done + 1)[0]
    samples = run.data.train
    batch = samples.images.fetch(chosen), samples.labels[chosen.to(run.device)]
    with random_state_restored(run.device):  # the same dropout as in the next step
        set_random_state(run.state["random"], run.device)
        rows = run.all_rows(run.state["params"], batch, buffers=run.state["buffers"])
        scale = diagnostics.noise_scale(rows, run.batch_size // len(rows)).samples
        cosine = diagnostics.agreement(rows)
    return {"cosine": cosine.item(), "noise_scale": scale.item()}
