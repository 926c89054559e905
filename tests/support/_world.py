"""Processes with a gloo process group, which run a function of a test module on every rank."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gradfilter import _tree

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "gradfilter", "gradfilter.distributed"])
PATIENCE = 600  # seconds for which a test waits for any rank: a hang, not a slow machine
REST = 5  # and for the others, once one of them has failed that should not


class Failed(AssertionError):
    """An error on a rank."""


class World:
    """W processes; ``run(function, *args)`` returns the result of ``function(*args)`` on each."""

    def __init__(self, size, timeout=PATIENCE):
        self.size, self.timeout = size, timeout
        self._open()

    def _open(self):
        size, timeout = self.size, self.timeout
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(there, store, rank, size, timeout), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, function, *args):
        """Start every rank."""
        for pipe in self.pipes:
            pipe.send((function, args))

    def outcome(self, rank):
        """Return ``(True, result)`` or ``(False, error)`` of a rank."""
        if not self.pipes[rank].poll(PATIENCE):
            raise Failed(f"rank {rank} has said nothing for {PATIENCE} s")
        return self.pipes[rank].recv()

    def outcomes(self):
        return [self.outcome(rank) for rank in range(len(self.pipes))]

    def run(self, function, *args):
        self.start(function, *args)
        found, patience = {}, PATIENCE
        while len(found) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in found]
            ready = multiprocessing.connection.wait(waiting, patience)
            found |= {rank: self._said(rank) for rank in map(self.pipes.index, ready)}
            wrong = [f"rank {rank}: {said}" for rank, (fine, said) in found.items() if not fine]
            patience = REST if wrong else PATIENCE
            if not ready:
                break
        lost = [process for process in self.processes if not process.is_alive()]
        if lost or not ready:  # the others may wait for it: only new processes are of any use
            self.close()
            self._open()
        if wrong or not ready:
            raise Failed("\n".join(wrong) or f"ranks said nothing for {patience} s")
        return [found[rank][1] for rank in range(self.size)]

    def _said(self, rank):
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return False, f"its process died, exit code {self.processes[rank].exitcode}"

    def errors(self, function, *args):
        """Return the messages that all ranks raised; raise an error if a rank did not."""
        self.start(function, *args)
        found = self.outcomes()
        assert not any(fine for fine, _ in found), found
        return [said for _, said in found]

    def close(self):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        self.folder.cleanup()


def _serve(pipe, store, rank, size, timeout):
    faulthandler.enable()  # a crash in native code says where Python was
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():  # what one function makes an error is none in the next
                pipe.send((True, function(*args)))
        except Exception as error:
            pipe.send((False, f"{error}\n{traceback.format_exc()}"))


def mine(tree):
    """Return the rows of this rank from those of all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return _tree.tree_map(lambda t: t.unflatten(0, (size, -1))[rank], tree)
