"""What every test of the project has, those of the documentation strings too."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Draw the same random numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def closed_process_group() -> Iterator[None]:
    """Close the process group of an example that failed before its last line did."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP do what they usually do.

    Who runs the tests decides what they do otherwise: `nohup` ignores SIGHUP, a job that a shell
    script started in the background ignores SIGINT, and all child processes with it. Only tests
    that send a signal ask for this: the others stay deaf to a closed terminal under `nohup`.
    """
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    usual["SIGHUP"] = signal.SIG_DFL
    with ExitStack() as stack:
        for name, handler in usual.items():
            if number := getattr(signal, name, None):  # Windows has no SIGHUP
                before = signal.signal(number, handler)
                stack.callback(signal.signal, number, before or signal.SIG_DFL)
        yield
