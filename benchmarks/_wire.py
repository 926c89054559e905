"""Count the bytes that collectives send, from the tensors passed to the process group."""

from pathlib import Path

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _bytes(tensors):
    flat = []
    for item in tensors if isinstance(tensors, list | tuple) else [tensors]:
        flat += item if isinstance(item, list | tuple) else [item]
    return sum(t.numel() * t.element_size() for t in flat)


class Wire(TorchDispatchMode):
    """Count the bytes that one rank sends with ring algorithms, and record every collective."""

    def __init__(self, size):
        super().__init__()
        self.size, self.sent, self.calls = size, 0.0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        space, _, call = name.partition("::")
        talks = space in ("c10d", "_c10d_functional")
        if talks and not call.startswith(("wait", "_wrap")):
            self.calls.append(call)
            self.sent += self._leaving(self.calls[-1], args)
        return function(*args, **(kwargs or {}))

    def _leaving(self, name, args):
        share = (self.size - 1) / self.size
        if name == "alltoall_base_":
            return _bytes(args[1]) * share  # (output, input)
        if name in ("_allgather_base_", "allgather_into_tensor_coalesced_"):
            return _bytes(args[1]) * (self.size - 1)
        if name == "all_gather_into_tensor":
            return _bytes(args[0]) * (self.size - 1)
        if name == "_reduce_scatter_base_":
            return _bytes(args[1]) * share
        if name == "reduce_scatter_tensor":
            return _bytes(args[0]) * share
        if name == "broadcast_":  # all bytes count for the rank that sends them
            return _bytes(args[0]) * (self.size - 1) if args[2] == dist.get_rank() else 0.0
        if name in ("allreduce_", "all_reduce"):
            return 2 * _bytes(args[0]) * share
        raise AssertionError(f"expected a collective with a known number of bytes, found {name}")


def loopback_bytes(statistics: Path = Path("/proc/net/dev")) -> int | None:
    """Return the bytes that this machine has sent to itself, or None if unknown."""
    if not statistics.exists():
        return None
    for line in statistics.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return None
