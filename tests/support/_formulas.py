"""Run eager steps with the formulas that a graph holds."""

from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from gradfilter.transforms._update_rules import FusedKernel


class Watched(TorchDispatchMode):
    """Under a mode no number is read on the host, as in a graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def formulas():
    """Use the formulas that a graph holds, instead of fused kernels and numbers on the host."""
    with mock.patch.object(FusedKernel, "fits", lambda *_: False), Watched():
        yield
