"""The workers of one command: they are signalled, they end with it, and they share its cores."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from gradfilter.lab.sweep import _attended
from gradfilter.lab.sweep import _workers as _jobs
from gradfilter.lab.sweep._workers import _end, _environment, _exit_on_signals, _interrupted

DEAF_ONCE = """
import signal, sys, time
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.01)
print("told", flush=True)
while len(told) < 2:
    time.sleep(0.01)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def started():
    """Starts processes that do not listen well, and waits until they do not."""
    processes = []

    def start(code):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-S", "-c", code], **pipes)
        processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@posix
def test_a_worker_that_missed_ctrl_c_is_told_again(started):
    worker = started(DEAF_ONCE)
    assert not _interrupted([worker], 0.1)
    assert worker.stdout.readline() == b"told\n"  # two signals that wait together are one
    assert _interrupted([worker], 120.0)
    assert worker.returncode == 0


@posix
def test_all_workers_have_their_last_words_at_the_same_time(started, monkeypatch):
    workers = [started(DEAF) for _ in range(3)]
    clock = [0.0]

    def wait(worker, timeout):
        clock[0] += timeout
        raise subprocess.TimeoutExpired(worker.args, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(_jobs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        patch.setattr(subprocess.Popen, "wait", wait)
        assert not _interrupted(workers, 5.0)
    assert clock == [5.0]  # 15 seconds, one after the other
    monkeypatch.setattr(_jobs, "LAST_WORDS", 0.1)
    _end(workers)
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 3


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("usual_signals")
def test_a_polite_kill_and_a_closed_terminal_are_an_exit(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, ExitStack() as stack:
        _exit_on_signals(stack)
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before


@posix
def test_nohup_is_left_as_it_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ExitStack() as stack:
            _exit_on_signals(stack)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_a_worker_does_not_outlive_who_started_it(monkeypatch):
    reading, writing = os.pipe()
    done = []

    def sleep(seconds):
        done.append("sleeps")
        if len(done) == 4:
            sys.exit()

    monkeypatch.setattr(_attended.os, "kill", lambda *told: done.append(told))
    monkeypatch.setattr(_attended.time, "sleep", sleep)
    os.write(writing, b"?")
    os.close(writing)  # as when the other end is killed
    with pytest.raises(SystemExit):
        _attended.follow(reading)
    os.close(reading)
    assert done == [(os.getpid(), signal.SIGINT), "sleeps"] * 2


def test_workers_share_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(2)["OMP_NUM_THREADS"] == "2"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert _environment(2)["OMP_NUM_THREADS"] == "32"


def test_windows_has_no_ctrl_c_for_one_process(monkeypatch):
    class Process:
        def __init__(self):
            self.told = []

        def poll(self):
            return 1 if self.told else None

        def send_signal(self, number):
            if number not in (signal.SIGTERM,):  # as Popen says there
                raise ValueError(f"Unsupported signal: {number}")
            self.told.append(number)

        def wait(self, timeout):
            return 1

    monkeypatch.setattr(sys, "platform", "win32")
    assert _interrupted([Process()], 1.0)
