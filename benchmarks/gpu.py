"""Run all measurements that need a GPU, in less than eight minutes.

The cases are plans on four kinds of model in float32 and bfloat16, captured and compiled steps, SAM
per row, models with activation checkpointing, a check whether a step waits for the device, the
routes to the weight gradients of convolutions, and memory. If a case fails, its reason is recorded.
The JSON is written after every case.

Every case has an equal share of the time that is left: after it no round begins, and after three
times as long the case ends. What did not run in time is named at the end; `--cases` runs it.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --cases resnet18 conv
    python benchmarks/gpu.py --device cpu --quick      (tests the code only)
"""

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._command import facts, parser, rounds_of
from benchmarks._gpu_cases import CASES, Options
from benchmarks._results import earlier, write
from benchmarks._timing import reason

NAME = Path(__file__).stem
MINUTES = 7.5  # the start and the end of the program are not counted
LONGEST = 3  # the number of shares that a case may take


class TimeIsUp(BaseException):
    """Ends a case. It is not an Exception, which the case would record as one contender's."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the body after some time, where the system has alarms."""

    def stop(*_: object) -> None:
        raise TimeIsUp

    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, CASES, called="cases", rounds=10)
    command.add_argument("--minutes", type=float, default=MINUTES, help=f"in all ({MINUTES})")
    command.set_defaults(device="cuda")
    choice = command.parse_args(arguments)
    options = Options(torch.device(choice.device), rounds_of(choice), choice.quick)
    warnings.filterwarnings(
        "ignore", message="There is a performance drop"
    )  # from vmap; its time shows it
    console = Console()
    head = facts(NAME, choice)
    target = choice.out / f"{NAME}-{choice.device}.json"
    cases = earlier(target, head).get("cases", {})
    end, late = time.perf_counter() + 60 * choice.minutes, []
    for number, name in enumerate(choice.cases):
        start = time.perf_counter()
        share = (end - start) / (len(choice.cases) - number)
        try:
            with stopped_after(min(LONGEST * share, end - start)):
                cases[name] = CASES[name](replace(options, until=start + share))
        except TimeIsUp:  # an earlier result stays
            late.append(name)
            cases.setdefault(name, {"failure": "not measured: the time was over"})
        except Exception as error:  # for any error, the other cases continue
            cases[name] = {"failure": reason(error)}
        cases[name]["took"] = time.perf_counter() - start
        write(target, {**head, "cases": cases})
        failure = cases[name].get("failure", "")
        console.print(f"{name}: {cases[name]['took']:.0f} s {failure}", markup=False)
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if late:
        console.print(f"Not measured in {choice.minutes:g} minutes: {' '.join(late)}", markup=False)


if __name__ == "__main__":
    main()
