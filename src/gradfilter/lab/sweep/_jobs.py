"""Several workers on this machine, each the same command with one job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from gradfilter.lab._interrupt import interruptible
from gradfilter.lab.sweep._queue import OPEN, Queue
from gradfilter.lab.train._progress import progress_bar

COMMAND = (sys.executable, "-m", "gradfilter", "sweep")
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
    with ExitStack() as stack:
        stopped = stack.enter_context(interruptible())
        # A scheduler's polite kill has to reach the workers, too.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        stack.callback(signal.signal, signal.SIGTERM, before)
        workers = []
        for index in range(jobs):
            log = folder / f"{socket.gethostname()}-{os.getpid()}-{index}.log"
            said = stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                [*COMMAND, *worker_options(options, device_of(queue.plan.base.device, index))],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(jobs),
                # The terminal's Ctrl-C is for this process, which tells them once.
                start_new_session=True,
            )
            stack.callback(_end, process)
            workers.append((process, log))
        console = Console(stderr=True)
        done = _done(queue)
        with progress_bar(console, "trainings", queue.plan.trials, done) as tick:
            while any(process.poll() is None for process, _ in workers):
                if stopped():
                    _interrupt([process for process, _ in workers])
                    return False
                time.sleep(POLL)
                for _ in range(_done(queue) - done):
                    tick()
                    done += 1
        for process, log in workers:
            if process.returncode not in (0, 1):
                print(f"a worker ended with exit code {process.returncode}: {log}", file=sys.stderr)
    return True


def worker_options(options: Sequence[str], device: str) -> list[str]:
    """The same command with one job, on its own device.

    Example:
        >>> worker_options(["--grid", "seed=0,1", "--", "--epochs", "5"], "cuda:1")[2:]
        ['--jobs', '1', '--no-retry-failed', '--', '--epochs', '5', '--device', 'cuda:1']
    """
    own, rest = split(options)
    return [*own, "--jobs", "1", "--no-retry-failed", "--", *rest, "--device", device]


def split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of sweep, and those of train after a lone ``--``.

    Example:
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
    cores = os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}


def _done(queue: Queue) -> int:
    return sum(trial.state not in OPEN for trial in queue.trials())


def _interrupt(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in workers:
        process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no worker behind, whatever ended this one."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
