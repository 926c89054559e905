"""Run the workers of a study: one training after the other, in one or several processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from optuna.trial import FrozenTrial
from rich.console import Console

from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._run_files import open_own, printable
from gradfilter.lab.sweep._queue import (
    OPEN,
    Outcome,
    Queue,
    Unfinished,
    claim,
    count_unfinished,
    finish,
    outcome_of,
    requeue,
)
from gradfilter.lab.sweep._storage import FAULTS, heartbeats
from gradfilter.lab.sweep._sweep_config import split
from gradfilter.lab.train._progress import progress_bar

# --- One worker ---


QUEUE_POLL = 5.0
"""Longest time between two checks of the other workers, in seconds."""


def work(queue: Queue, say: Callable[[str], None]) -> bool:
    """Train until no training is left; wait for those of other workers, which may be killed.

    Args:
        queue: Queue of the study.
        say: Called with a line per finished training.

    Returns:
        False after Ctrl-C; the interrupted training then waits in the queue.

    Raises:
        UsageError: This machine cannot train.
    """
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    busy: set[int] = set()
    silent = False
    # Also checked here: a training in its last evaluation has no step left to stop at.
    with interruptible() as stopped:
        while not stopped():
            try:
                trial = claim(queue, worker, busy)
                if trial is None:
                    others = count_unfinished(queue)
                    if not others:
                        return True
                    if not silent:
                        say(f"waiting for {others} trainings of other workers")
                    silent = True
                    _wait(min(QUEUE_POLL, queue.heartbeat), stopped)
                    busy.clear()
                    continue
            except KeyboardInterrupt:
                return False  # a trial that was just taken is unsigned, or becomes stale
            found = _trained(queue, trial, worker, stopped)
            if found is Unfinished.BUSY:
                busy.add(trial.number)
            elif found is not Unfinished.INTERRUPTED:
                silent = False
                result = (
                    found.value
                    if isinstance(found, Unfinished)
                    else _result(queue, found.value, found.reason)
                )
                say(_result_line(queue, trial, result))
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
    """Train; without an outcome, return the trial to the queue."""
    found: Outcome | Unfinished = Unfinished.INTERRUPTED
    try:
        if not stopped():
            with heartbeats(queue.storage.rdb, queue.trial_id(trial.number), queue.heartbeat):
                found = outcome_of(queue.plan, queue.plan.config_of(trial.params))
        if isinstance(found, Outcome) and not finish(queue, trial.number, worker, found):
            found = Unfinished.TAKEN
    except KeyboardInterrupt:
        # A second Ctrl-C. The run resumes from its last point later.
        found = Unfinished.INTERRUPTED
    finally:
        if isinstance(found, Unfinished):
            requeue(queue, trial.number, worker)
    return found


def _result_line(queue: Queue, trial: FrozenTrial, result: str) -> str:
    """Return the result of a training in one line without control characters."""
    settings = ", ".join(
        f"{axis.name} {axis.value(trial.params[axis.name])}" for axis in queue.plan.axes
    )
    return printable(f"trial {trial.number}: {settings}: {result}")


def _result(queue: Queue, value: float | None, reason: str | None) -> str:
    """Return the metric of a training, or the reason why it has none."""
    return reason or f"{queue.plan.metric} {value:.4g}"


# --- Several workers, each the same command with one job ---


Worker = subprocess.Popen[bytes]
AGAIN = 10.0
"""Seconds until Ctrl-C is repeated: one that arrives while Python starts may be lost."""

COMMAND = (sys.executable, "-m", "gradfilter.lab.sweep._attended")
JOB_POLL = 0.5
LAST_WORDS = 30.0
"""Seconds that workers have after Ctrl-C to return their trainings to the queue."""


def run_workers(queue: Queue, options: Sequence[str], jobs: int, folder: Path) -> bool:
    """Start workers and wait for them; show a bar on a terminal, else a line per training.

    Args:
        queue: Queue of the study.
        options: Options of this command.
        jobs: Number of workers.
        folder: Folder of the log files.

    Returns:
        False after Ctrl-C, which is passed to every worker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {trial.number for trial in _closed(queue)}
    workers: list[Worker] = []
    logs = []
    with ExitStack() as stack:
        stopped = stack.enter_context(interruptible())
        _exit_on_signals(stack)
        stack.callback(_end, workers)
        for index in range(jobs):
            log = folder / f"{socket.gethostname()}-{os.getpid()}-{index}.log"
            said = stack.enter_context(open_own(log, "ab"))
            worker = subprocess.Popen(
                [*COMMAND, *worker_options(options, device_of(queue.plan.base.device, index))],
                stdin=subprocess.PIPE,  # closed when this process ends, which ends the worker
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(jobs),
                # The terminal sends Ctrl-C to this process, which passes it on.
                start_new_session=True,
            )
            workers.append(worker)
            logs.append(log)
        console = Console(stderr=True)
        with progress_bar(console, "trainings", queue.plan.trials, len(known)) as tick:
            results = _Results(queue, known, tick, lines=not console.is_terminal)
            while any(worker.poll() is None for worker in workers):
                if stopped():
                    while not _interrupted(workers, AGAIN):
                        pass
                    return False
                time.sleep(JOB_POLL)
                results.show_new()
            results.show_new()  # those that ended after the last look
        for worker, log in zip(workers, logs, strict=True):
            if worker.returncode not in (0, 1):
                ended = f"a worker ended with exit code {worker.returncode}: {log}"
                print(printable(ended), file=sys.stderr)
    return True


@dataclass(frozen=True)
class _Results:
    """The results of all workers, each of which is shown once.

    Attributes:
        queue: Queue of the study.
        known: Numbers of the trainings that were shown, or finished before.
        tick: Called for each one, to advance the bar.
        lines: Whether to print a line for each one.
    """

    queue: Queue
    known: set[int]
    tick: Callable[[], None]
    lines: bool

    def show_new(self) -> None:
        """Show the trainings that have finished since the last call."""
        with suppress(*FAULTS):  # a database may be briefly out of reach
            for trial in _closed(self.queue):
                if trial.number not in self.known:
                    self.known.add(trial.number)
                    self.tick()
                    if self.lines:
                        reason = trial.user_attrs.get("reason")
                        result = _result(self.queue, trial.value, reason)
                        print(_result_line(self.queue, trial, result), flush=True)


def worker_options(options: Sequence[str], device: str) -> list[str]:
    """Return the same command with one job, on its own device.

    Examples:
        >>> worker_options(["--grid", "seed=0,1", "--", "--epochs", "5"], "cuda:1")[2:]
        ['--jobs', '1', '--no-retry-failed', '--', '--epochs', '5', '--device', 'cuda:1']
    """
    own, rest = split(options)
    return [*own, "--jobs", "1", "--no-retry-failed", "--", *rest, "--device", device]


def device_of(name: str, index: int) -> str:
    """Return the device of a worker: its own GPU, if there are several of that kind."""
    device = torch.device(name)
    several = device.type != "cpu" and torch.accelerator.device_count() > 1
    if not several or ":" in name:
        return name
    return f"{device.type}:{index % torch.accelerator.device_count()}"


def _environment(jobs: int) -> dict[str, str]:
    """Return the environment of workers, which share the cores."""
    return {"OMP_NUM_THREADS": str(max(1, _cores() // jobs)), **os.environ}


def _cores() -> int:
    """Return how many cores this process may use; a scheduler or taskset may limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _closed(queue: Queue) -> list[FrozenTrial]:
    return [trial for trial in queue.trials() if trial.state not in OPEN]


def _exit_on_signals(stack: ExitStack) -> None:
    """Pass a scheduler's SIGTERM and a closed terminal on to the workers."""
    for number in (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ())):
        before = signal.getsignal(number)
        if before is not signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _exit)
            stack.callback(signal.signal, number, before or signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _interrupted(workers: Sequence[Worker], seconds: float) -> bool:
    """Interrupt all workers, and wait at most `seconds` seconds for their end."""
    for worker in workers:
        if worker.poll() is None:
            # Windows has no Ctrl-C for a single process.
            worker.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
    end = time.monotonic() + seconds
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, end - time.monotonic()))
    return all(worker.poll() is not None for worker in workers)


def _end(workers: Sequence[Worker]) -> None:
    """Kill the remaining workers, for any reason that ended this process."""
    if not _interrupted(workers, LAST_WORDS):
        for worker in workers:
            worker.kill()
    for worker in workers:
        worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()
