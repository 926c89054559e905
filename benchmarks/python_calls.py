"""Count the calls of Python functions and the Python instructions of one step.

A small step is limited by Python, and on a busy machine its time says little. The counts do not
depend on the machine, only on the versions of Python, torch and this library. They include torch's
own Python code, and omit other threads: on a GPU those that run the backward pass.

"plain" is one ordinary forward and backward pass. "filter" computes the rows, their Gram, the
agreement filter and the weighted sum. "step" also changes the parameters by SGD with momentum. "SAM
per row" perturbs every row along its own gradient, and takes two passes.

    python benchmarks/python_calls.py
    python benchmarks/python_calls.py --before earlier/python_calls-cpu.json
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import facts, parser
from benchmarks._models import TASKS, Task
from benchmarks._results import write
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender

NAME = Path(__file__).stem
MODELS = ("mlp", "lenet", "gpt")
RHO = 0.05
WARM_UP = 4  # what is remembered between steps is not counted
OURS, TORCH = "gradfilter", "torch"
SHOWN = 40  # the functions listed in the file


@dataclass(frozen=True)
class Counts:
    """The counts of one step.

    Attributes:
        calls: The calls of Python functions; every resumption of a generator is one.
        instructions: The Python instructions.
        calls_of: The calls of functions of this library, of torch, and of others.
        functions: The functions that are called most, with their calls.
    """

    calls: int
    instructions: int
    calls_of: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)


def count(step: Contender) -> Counts:
    """Count one step, after some others."""
    for _ in range(WARM_UP):
        step()
    calls = count_calls(step)
    packages: Counter[str] = Counter()
    for name, number in calls.items():
        package = name.partition("/")[0]
        packages[package if package in (OURS, TORCH) else "others"] += number
    return Counts(
        calls.total(),
        count_instructions(step),
        dict(packages),
        dict(sorted(calls.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]),
    )


def count_calls(step: Contender) -> Counter[str]:
    """Count the calls of every Python function in this thread."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found[_name(frame)] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    del found[_name_of(step)]
    return +found


def count_instructions(step: Contender) -> int:
    """Count the Python instructions in this thread, in the second of two runs.

    From Python 3.12 on, a tracer misses instructions of a function that it has not seen before.
    """
    found = 0

    def each(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal found
        found += event == "opcode"
        return each

    def begin(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return each

    before = sys.gettrace()
    sys.settrace(begin)
    try:
        step()
        found = 0
        step()
    finally:
        sys.settrace(before)
    return found


def _name(frame: FrameType) -> str:
    """Return a function's file from its package on, and its name."""
    return _described(frame.f_code.co_filename, frame.f_code.co_qualname)


def _name_of(function: Any) -> str:
    return _described(function.__code__.co_filename, function.__code__.co_qualname)


def _described(filename: str, name: str) -> str:
    parts = Path(filename).parts
    for package in (OURS, TORCH):
        if package in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(package) - 1 :]) + f" {name}"
    return f"{parts[-1]} {name}"


def contenders(
    task: Task, microbatches: int, samples: int, device: torch.device
) -> dict[str, Contender]:
    """Return the steps that are counted."""
    setting = Setting.of(task, microbatches * samples, device)
    momentum = gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(0.1, momentum=0.9))
    along = gf.chain(gf.sam_perturb(RHO, per_microbatch=True), gf.mean_rows(), gf.sgd(0.1))
    steps: dict[str, Callable[[], Any]] = {
        "plain": setting.plain,
        "filter": setting.filtered(microbatches, "fused"),
        "step": setting.step(microbatches, "fused", momentum),
        "SAM per row": setting.step(microbatches, "fused", along),
    }
    return {name: _called(step) for name, step in steps.items()}


def _called(step: Contender) -> Contender:
    """Return a function of its own, whose call is not counted."""

    def run() -> None:
        step()

    return run


def measure(name: str, task: Task, device: torch.device) -> dict[str, Any]:
    """Count every contender on one model, at its first size."""
    microbatches, samples = task.workloads[0]
    return {
        "model": name,
        "title": task.title,
        "microbatches": microbatches,
        "samples_per_microbatch": samples,
        "counts": {
            contender: asdict(count(step))
            for contender, step in contenders(task, microbatches, samples, device).items()
        },
    }


def table(workloads: list[dict[str, Any]]) -> Table:
    """Return one row per contender: calls, instructions, and those of earlier counts."""
    grid = Table(title="Python calls and instructions of one step")
    for head in ("model (M, B)", "step", "calls", "gradfilter", "torch", "instructions", "before"):
        grid.add_column(head, justify="left" if head in ("model (M, B)", "step") else "right")
    for workload in workloads:
        label = "{title} ({microbatches}, {samples_per_microbatch})".format(**workload)
        for name, counts in workload["counts"].items():
            before = workload.get("before", {}).get(name)
            grid.add_row(
                *(label, name, str(counts["calls"])),
                *(str(counts["calls_of"].get(package, 0)) for package in (OURS, TORCH)),
                str(counts["instructions"]),
                f"{before['calls']}, {before['instructions']}" if before else "",
            )
            label = ""
    return grid


def with_before(workloads: list[dict[str, Any]], before: Path) -> None:
    """Add the counts of an earlier file to those of the same models."""
    earlier = {w["model"]: w["counts"] for w in _read(before)}
    for workload in workloads:
        if workload["model"] in earlier:
            workload["before"] = earlier[workload["model"]]


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["workloads"]
    return found


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__ or "", MODELS)
    command.add_argument("--before", type=Path, help="a file of earlier counts, to compare with")
    return command.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    names = options.models[:1] if options.quick else options.models
    workloads = [measure(name, TASKS[name], torch.device(options.device)) for name in names]
    if options.before is not None:
        with_before(workloads, options.before)
    target = options.out / f"{NAME}-{options.device}.json"
    write(target, {**facts(NAME, options), "workloads": workloads})
    Console().print(table(workloads))


if __name__ == "__main__":
    main()
