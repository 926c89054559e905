"""The training loop: from mark to mark, with everything that is due on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradfilter.lab.train import _totals
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._marks import (
    checkpoint_is_due,
    evaluation_is_due,
    is_epoch_end,
    next_mark,
)
from gradfilter.lab.train._run import Run, advance, evaluation, settle


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """What else is done on the way; by default nothing.

    Attributes:
        evaluated: Called with every evaluation.
        checkpoint: Called when a checkpoint is due.
        point: Called where a killed run may go on from.
        tick: Called after every step.
    """

    evaluated: Callable[[Evaluation], None] = _nothing
    checkpoint: Callable[[Run], None] = _nothing
    point: Callable[[Run], None] = _nothing
    tick: Callable[[], None] = _nothing


def train_to_the_end(run: Run, watch: Watch, stopped: Callable[[], bool]) -> bool:
    """Train until the last step, or until ``stopped()``.

    Args:
        run: New, or put where it was left.
        watch: What else is done.
        stopped: Asked before every step.

    Returns:
        Whether the training is over; else it can go on later.
    """
    if run.done == 0:
        watch.evaluated(evaluation(run))
        watch.checkpoint(run)
    while run.done < run.total_steps:
        mark = next_mark(run)
        advance(run, mark, stopped=stopped, tick=watch.tick)
        settle(run)
        if run.done < mark:
            watch.point(run)
            return False
        if pass_mark(run, watch):
            return True
    return True


def pass_mark(run: Run, watch: Watch) -> bool:
    """Do what is due where a run stands.

    Returns:
        Whether the training is over.
    """
    ended = is_epoch_end(run)
    exits = ended and _exits_early(run.config.early_exit_accuracy, run.config.early_exit_loss)
    watches = ended and run.config.schedule == "plateau"
    due = evaluation_is_due(run)
    measured = evaluation(run) if due or exits or watches else None
    over = run.done == run.total_steps
    if measured is not None:
        # What is watched is not the test split, which may not steer a training.
        watched = measured.loss if math.isnan(measured.val_loss) else measured.val_loss
        good, watched = run.crew.agreed([exits and _is_good_enough(run, measured), watched])
        over = over or bool(good)
        if watches:
            run.report = watched
        if due or over:
            watch.evaluated(measured)
    if over or checkpoint_is_due(run):
        watch.checkpoint(run)
    if ended:
        run.totals = _totals.nothing(run.device)
        run.epoch_seconds = 0.0
    # After an early exit the point would be one from which a killed run trains on.
    if not over or run.done == run.total_steps:
        watch.point(run)
    return over


def _exits_early(accuracy: float | None, loss: float | None) -> bool:
    return accuracy is not None or loss is not None


def _is_good_enough(run: Run, measured: Evaluation) -> bool:
    accuracy, loss = run.config.early_exit_accuracy, run.config.early_exit_loss
    return (accuracy is not None and measured.train_accuracy >= accuracy) or (
        loss is not None and measured.train_loss <= loss
    )
