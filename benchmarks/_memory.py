"""Measure the peak memory of the new storage of a computation."""

import gc
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_bytes(computation: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes allocated at one time, in addition to those at the start.

    The result of the computation is counted, and tensors from before are not. Run the computation
    once before, so that the permanent workspaces of libraries are not counted.
    """
    gc.collect()  # otherwise old reference cycles could be freed during the computation
    return _cuda_peak(computation, device) if device.type == "cuda" else _cpu_peak(computation)


def _cuda_peak(computation: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    computation()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(computation: Callable[[], object]) -> int:
    # The profiler records every allocation and every free of torch's CPU allocator when it happens.
    # Resident memory would also include pages that malloc keeps after a free. A TorchDispatchMode
    # sees the results of operators, but not the temporary tensors inside their kernels, nor the
    # moment when autograd frees saved tensors. Memory from other allocators, such as that of
    # oneDNN, is visible only in resident memory.
    with profile(profile_memory=True) as recorded:
        result = computation()
    del result
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
