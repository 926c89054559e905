"""The workers of a study: one training after the other, several processes on one machine."""

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
    finish,
    left,
    outcome_of,
    put_back,
)
from gradfilter.lab.sweep._storage import FAULTS, beating
from gradfilter.lab.train._progress import progress_bar

# --- One worker ---


QUEUE_POLL = 5.0
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
                    _wait(min(QUEUE_POLL, queue.heartbeat), stopped)
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


# --- Several workers, each the same command with one job ---


Worker = subprocess.Popen[bytes]
AGAIN = 10.0
"""Seconds after which a Ctrl-C is repeated: one that comes while Python starts may be lost."""

COMMAND = (sys.executable, "-m", "gradfilter.lab.sweep._attended")
JOB_POLL = 0.5
LAST_WORDS = 30.0
"""Seconds that workers have after Ctrl-C to put their trainings back."""


def run_workers(queue: Queue, options: Sequence[str], jobs: int, folder: Path) -> bool:
    """Start workers and wait for them.

    Args:
        queue: Of the study.
        options: Of this command.
        jobs: How many workers.
        folder: For what they say.

    Returns:
        False after Ctrl-C, which every worker is told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(queue)
    workers: list[Worker] = []
    logs = []
    with ExitStack() as stack:
        stopped = stack.enter_context(interruptible())
        _leave_politely(stack)
        stack.callback(_end, workers)
        for index in range(jobs):
            log = folder / f"{socket.gethostname()}-{os.getpid()}-{index}.log"
            said = stack.enter_context(open_own(log, "ab"))
            worker = subprocess.Popen(
                [*COMMAND, *worker_options(options, device_of(queue.plan.base.device, index))],
                stdin=subprocess.PIPE,  # whose end tells it that this process is gone
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(jobs),
                # The terminal's Ctrl-C is for this process, which tells them.
                start_new_session=True,
            )
            workers.append(worker)
            logs.append(log)
        console = Console(stderr=True)
        with progress_bar(console, "trainings", queue.plan.trials, done) as tick:
            while any(worker.poll() is None for worker in workers):
                if stopped():
                    while not _interrupted(workers, AGAIN):
                        pass
                    return False
                time.sleep(JOB_POLL)
                with suppress(*FAULTS):  # a database may be away for a moment
                    for _ in range(_done(queue) - done):
                        tick()
                        done += 1
        for worker, log in zip(workers, logs, strict=True):
            if worker.returncode not in (0, 1):
                ended = f"a worker ended with exit code {worker.returncode}: {log}"
                print(printable(ended), file=sys.stderr)
    return True


def worker_options(options: Sequence[str], device: str) -> list[str]:
    """The same command with one job, on its own device.

    Examples:
        >>> worker_options(["--grid", "seed=0,1", "--", "--epochs", "5"], "cuda:1")[2:]
        ['--jobs', '1', '--no-retry-failed', '--', '--epochs', '5', '--device', 'cuda:1']
    """
    own, rest = split(options)
    return [*own, "--jobs", "1", "--no-retry-failed", "--", *rest, "--device", device]


def split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of sweep, and those of train after a lone ``--``.

    Examples:
        >>> split(["--jobs", "2", "--", "--epochs", "5"])
        (['--jobs', '2'], ['--epochs', '5'])
    """
    end = list(options).index("--") if "--" in options else len(options)
    return list(options[:end]), list(options[end + 1 :])


def device_of(name: str, index: int) -> str:
    """The device of a worker: a GPU of its own, where there are several of the kind asked for."""
    device = torch.device(name)
    several = device.type != "cpu" and torch.accelerator.device_count() > 1
    if not several or ":" in name:
        return name
    return f"{device.type}:{index % torch.accelerator.device_count()}"


def _environment(jobs: int) -> dict[str, str]:
    """Workers share the cores instead of starting a thread for each of them."""
    return {"OMP_NUM_THREADS": str(max(1, _cores() // jobs)), **os.environ}


def _cores() -> int:
    """How many this process may use, which a scheduler or taskset limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _done(queue: Queue) -> int:
    return sum(trial.state not in OPEN for trial in queue.trials())


def _leave_politely(stack: ExitStack) -> None:
    """Let a scheduler's polite kill and a closed terminal reach the workers, too."""
    for number in (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ())):
        before = signal.getsignal(number)
        if before is not signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, _leave)
            stack.callback(signal.signal, number, before or signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _interrupted(workers: Sequence[Worker], seconds: float) -> bool:
    """Press Ctrl-C in all workers, and wait at most so long for their end."""
    for worker in workers:
        if worker.poll() is None:
            # Windows knows no Ctrl-C for one process.
            worker.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
    end = time.monotonic() + seconds
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, end - time.monotonic()))
    return all(worker.poll() is not None for worker in workers)


def _end(workers: Sequence[Worker]) -> None:
    """Leave no worker behind, whatever ended this one."""
    if not _interrupted(workers, LAST_WORDS):
        for worker in workers:
            worker.kill()
    for worker in workers:
        worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()
