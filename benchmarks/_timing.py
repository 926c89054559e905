"""Time contenders in turn, in an order that rotates, and report quartiles.

On a machine that also does other work, the speed changes within seconds and minutes. If contenders
were timed one after the other, the result would depend on the moment. Here every round runs each
contender once and starts with the next contender. Contenders are compared within each round.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Contender = Callable[[], object]
Clock = Callable[[Contender], float]


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a list of measurements."""

    median: float
    lower_quartile: float
    upper_quartile: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        # quantiles() needs two values, so a single value is used twice.
        low, median, high = statistics.quantiles(
            values if len(values) > 1 else values * 2, n=4, method="inclusive"
        )
        return cls(median, low, high, min(values), max(values))


@dataclass
class Timings:
    """Seconds per round of each contender, and the reasons of those that failed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def seconds_of(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio_to(self, base: str, name: str) -> Spread:
        """Return the ratios within each round, so that a drift of the machine has no effect."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([own / other for own, other in pairs])


def clock_for(device: torch.device) -> Clock:
    """Return a function that times one call on a device, in seconds."""
    return _cuda_seconds if device.type == "cuda" else _cpu_seconds


def _cpu_seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start


def _cuda_seconds(contender: Contender) -> float:
    # The device is idle when the first event is recorded. So the time in which it waits for the
    # host to launch kernels also counts, as in training.
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    contender()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def rotations(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Yield the order of each round: every contender is equally often first, second, and so on."""
    for r in range(rounds):
        start = r % len(names)
        yield names[start:] + names[:start]


def interleave(
    contenders: dict[str, Contender],
    rounds: int,
    clock: Clock,
    *,
    warmup: int = 1,
    until: float | None = None,
) -> Timings:
    """Time every contender once per round, after rounds to warm up.

    If a contender raises an error, it takes no further part, and the reason is kept. No round
    begins after the time ``until`` of `time.perf_counter`, except for the first one that is timed.
    """
    timings = Timings({name: [] for name in contenders})
    for number, order in enumerate(rotations(list(contenders), warmup + rounds)):
        if until is not None and number > warmup and time.perf_counter() > until:
            break
        for name in order:
            if name in timings.failures:
                continue
            try:
                seconds = clock(contenders[name])
            except Exception as error:  # the report shows any error
                timings.failures[name] = reason(error)
                del timings.seconds[name]
                continue
            if number >= warmup:
                timings.seconds[name].append(seconds)
    return timings


def reason(error: Exception) -> str:
    """Return one line about an error, as text, because a traceback would keep tensors alive."""
    text = str(error).strip()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text:
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
