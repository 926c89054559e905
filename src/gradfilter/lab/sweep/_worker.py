"""A worker: takes one training after the other until all are done."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable

from optuna.trial import FrozenTrial

from gradfilter.lab.sweep._heartbeat import beating
from gradfilter.lab.sweep._outcome import Outcome, Unfinished, outcome_of
from gradfilter.lab.sweep._queue import Queue, claim, finish, left, put_back

POLL = 5.0
"""Longest time in seconds from one look at what others do to the next."""


def work(queue: Queue, heartbeat: int, say: Callable[[str], None]) -> bool:
    """Train until nothing is left, waiting for what others train: they may be killed.

    Args:
        queue: Of the study.
        heartbeat: Seconds between two signs of life.
        say: Is told what comes of every training.

    Returns:
        False after Ctrl-C; the training at work then waits for somebody to go on with it.
    """
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    busy: set[int] = set()
    silent = False
    while True:
        try:
            trial = claim(queue, worker, busy)
            if trial is None:
                others = left(queue)
                if not others:
                    return True
                if not silent:
                    say(f"waiting for {others} trainings of other workers")
                silent = True
                time.sleep(min(POLL, heartbeat))
                busy.clear()
                continue
        except KeyboardInterrupt:
            return False  # what was taken just now is not signed, or goes stale
        found = _trained(queue, trial, worker, heartbeat)
        if found is Unfinished.INTERRUPTED:
            return False
        if found is Unfinished.BUSY:
            busy.add(trial.number)
        else:
            silent = False
            say(_told(queue, trial, found))


def _trained(queue: Queue, trial: FrozenTrial, worker: str, heartbeat: int) -> Outcome | Unfinished:
    """Train; without an outcome the trial waits again."""
    config = queue.plan.config_of(trial.params)
    found: Outcome | Unfinished = Unfinished.INTERRUPTED
    try:
        with beating(queue.storage.rdb, queue.trial_id(trial.number), heartbeat):
            found = outcome_of(queue.plan, config)
        if isinstance(found, Outcome):
            finish(queue, trial.number, worker, found)
    except KeyboardInterrupt:
        # Between two trainings, or a second Ctrl-C. The run goes on from its last point.
        found = Unfinished.INTERRUPTED
    finally:
        if isinstance(found, Unfinished):
            put_back(queue, trial.number, worker)
    return found


def _told(queue: Queue, trial: FrozenTrial, outcome: Outcome) -> str:
    """What came of a training, in one line."""
    settings = ", ".join(
        f"{axis.name} {axis.value(trial.params[axis.name])}" for axis in queue.plan.axes
    )
    result = outcome.reason or f"{queue.plan.metric} {outcome.value:.4g}"
    return f"trial {trial.number}: {settings}: {result}"
