"""Peak memory of the new storage that a computation makes."""

import gc
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_bytes(computation: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes allocated at one time, above what was allocated at the start.

    What existed before is not counted; the result is. Run the computation once beforehand, so that
    workspaces which libraries allocate once and keep are not counted either.
    """
    gc.collect()  # cycles left from before would be freed at some moment in the middle
    return _cuda_peak(computation, device) if device.type == "cuda" else _cpu_peak(computation)


def _cuda_peak(computation: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    computation()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(computation: Callable[[], object]) -> int:
    # The profiler hears of every allocation and every free from torch's CPU allocator itself, at
    # the moment it happens. Resident memory would also count pages that malloc keeps after a free,
    # and a TorchDispatchMode sees the results of operators, but neither the scratch tensors inside
    # their kernels nor the moment at which autograd lets go of what it saved. Memory that does not
    # come from torch's allocator, such as oneDNN's scratch pads, is in none but the first.
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
