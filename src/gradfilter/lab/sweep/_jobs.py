"""Several workers on this machine, each the same command with one job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._reading import printable
from gradfilter.lab._rundir import open_own
from gradfilter.lab.sweep._attended import AGAIN
from gradfilter.lab.sweep._queue import OPEN, Queue
from gradfilter.lab.sweep._storage import FAULTS
from gradfilter.lab.train._progress import progress_bar

Worker = subprocess.Popen[bytes]
COMMAND = (sys.executable, "-m", "gradfilter.lab.sweep._attended")
POLL = 0.5
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
                time.sleep(POLL)
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
