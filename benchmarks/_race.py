"""Time contenders in turn, then measure the memory of those that did not fail."""

from collections.abc import Callable
from functools import cache

import torch

from benchmarks._memory import peak_bytes
from benchmarks._results import Result
from benchmarks._timing import Contender, Timings, clock_for, interleave, reason


def race(
    entrants: dict[str, Contender],
    rounds: int,
    device: torch.device,
    *,
    base: str,
    warmup: int = 1,
    until: float | None = None,
) -> tuple[dict[str, Result], Timings]:
    """Time all contenders, with ratios to ``base``; the result of a failure is its reason.

    No further round begins after the time ``until``.
    """
    timings = interleave(entrants, rounds, clock_for(device), warmup=warmup, until=until)
    results = {}
    for name, run in entrants.items():
        if name in timings.failures:
            results[name] = Result(failure=timings.failures[name])
            continue
        try:
            peak = peak_bytes(run, device)
        except Exception as error:
            results[name] = Result(failure=reason(error))
            continue
        ratio = timings.ratio_to(base, name) if base in timings.seconds else None
        results[name] = Result(timings.seconds_of(name), ratio, peak)
    return results, timings


def deferred(build: Callable[[], Contender]) -> Contender:
    """Build a contender at its first call, so that a missing package fails only this one."""
    built = cache(build)
    return lambda: built()()
