"""Settings and fixtures of all tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from _world import World

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # every core has a worker of its own

# Examples take milliseconds or a compilation; a shared machine makes deadlines a lottery, and also
# the seconds that an example may take to be drawn.
settings.register_profile(
    "gradfilter",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gradfilter")


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def processes(size):
    """Ranks that a test module shares, started when it first asks for them."""
    world = World(size)
    yield world
    world.close()


@pytest.fixture(scope="module")
def two():
    yield from processes(2)


@pytest.fixture(scope="module")
def three():
    yield from processes(3)


@pytest.fixture(scope="module")
def four():
    yield from processes(4)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request):
    yield from processes(request.param)
