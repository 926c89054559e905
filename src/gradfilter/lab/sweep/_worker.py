"""A worker: takes one training after the other until all are done."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable

from optuna.trial import FrozenTrial

from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._reading import printable
from gradfilter.lab.sweep._heartbeat import beating
from gradfilter.lab.sweep._outcome import Outcome, Unfinished, outcome_of
from gradfilter.lab.sweep._queue import Queue, claim, finish, left, put_back

POLL = 5.0
"""Longest time in seconds from one look at what others do to the next."""


def work(queue: Queue, say: Callable[[str], None]) -> bool:
    """Train until nothing is left, waiting for what others train: they may be killed.

    Args:
        queue: Of the study.
        say: Is told what comes of every training.

    Returns:
        False after Ctrl-C; the training at work then waits for somebody to go on with it.

    Raises:
        UsageError: This machine cannot train.
    """
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    busy: set[int] = set()
    silent = False
    # Asked here, too: a training that was at its last evaluation has no step left to stop before.
    with interruptible() as stopped:
        while not stopped():
            try:
                trial = claim(queue, worker, busy)
                if trial is None:
                    others = left(queue)
                    if not others:
                        return True
                    if not silent:
                        say(f"waiting for {others} trainings of other workers")
                    silent = True
                    _wait(min(POLL, queue.heartbeat), stopped)
                    busy.clear()
                    continue
            except KeyboardInterrupt:
                return False  # what was taken just now is not signed, or goes stale
            found = _trained(queue, trial, worker, stopped)
            if found is Unfinished.BUSY:
                busy.add(trial.number)
            elif found is not Unfinished.INTERRUPTED:
                silent = False
                say(_told(queue, trial, found))
            else:
                return False
    return False


def _wait(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped():
        time.sleep(min(0.2, seconds))


def _trained(
    queue: Queue, trial: FrozenTrial, worker: str, stopped: Callable[[], bool]
) -> Outcome | Unfinished:
    """Train; without an outcome the trial waits again."""
    found: Outcome | Unfinished = Unfinished.INTERRUPTED
    try:
        if not stopped():
            with beating(queue.storage.rdb, queue.trial_id(trial.number), queue.heartbeat):
                found = outcome_of(queue.plan, queue.plan.config_of(trial.params))
        if isinstance(found, Outcome) and not finish(queue, trial.number, worker, found):
            found = Unfinished.TAKEN
    except KeyboardInterrupt:
        # A second Ctrl-C. The run goes on from its last point.
        found = Unfinished.INTERRUPTED
    finally:
        if isinstance(found, Unfinished):
            put_back(queue, trial.number, worker)
    return found


def _told(queue: Queue, trial: FrozenTrial, found: Outcome | Unfinished) -> str:
    """What came of a training, in one line."""
    settings = ", ".join(
        f"{axis.name} {axis.value(trial.params[axis.name])}" for axis in queue.plan.axes
    )
    if isinstance(found, Unfinished):
        result = found.value
    else:
        result = found.reason or f"{queue.plan.metric} {found.value:.4g}"
    return printable(f"trial {trial.number}: {settings}: {result}")
