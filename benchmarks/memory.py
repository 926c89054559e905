"""Measure the peak memory of a filtered step; the base is a plain forward and backward pass.

The memory is new storage from the first row to the weighted sum. M rows are M·P numbers, which a
plan needs if it stores them. With a smaller ``memory_budget``, plan "fused" keeps less, and with a
budget of 0 nothing; then each question runs its own backward pass. The times here are from a few
rounds; fused_vs_looped.py measures them better.

    python benchmarks/memory.py
"""

import os
import sys
import warnings
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS, Task
from benchmarks._plans import PLANS
from benchmarks._race import race
from benchmarks._report import MB
from benchmarks._results import Result, Workload, save
from benchmarks._setting import Setting

NAME = Path(__file__).stem
BUDGETS = {"fused, 2 P": 2, "fused, nothing": 0}  # in gradients
SIZES = {"mlp": ((32, 4), (32, 16)), "resnet18": ((32, 4), (32, 16))}
FLOAT = 4  # bytes
WARMUP = 8  # passes: the first, second, fourth and eighth also look for a hidden state


def measure(
    name: str, task: Task, size: tuple[int, int], rounds: int, device: torch.device
) -> Workload:
    microbatches, samples = size
    setting = Setting.of(task, microbatches * samples, device)
    entrants = {
        "plain": setting.plain,
        **{plan: setting.filtered(microbatches, plan) for plan in PLANS},
    }
    for label, gradients in BUDGETS.items():
        budget = gradients * setting.size * FLOAT
        entrants[label] = setting.filtered(microbatches, "fused", memory_budget=budget)
    results, _ = race(entrants, rounds, device, base="plain", warmup=WARMUP)
    return Workload(
        model=name,
        title=task.title,
        parameters=setting.size,
        results=results,
        microbatches=microbatches,
        samples_per_microbatch=samples,
    )


def print_table(workloads: list[Workload], about: str) -> None:
    grid = Table(title="Peak memory, and its ratio to plain", caption=about)
    grid.add_column("model (M, B)")
    for name in ("M·P", "plain", *PLANS, *BUDGETS):
        grid.add_column(name, justify="right")
    for workload in workloads:
        plain = workload.results["plain"].peak_bytes
        held = workload.microbatches * workload.parameters * FLOAT
        cells = [_cell(result, plain) for result in workload.results.values()]
        grid.add_row(workload.label, _size(held, plain), *cells)
    Console().print(grid)


def _cell(result: Result, plain: int | None) -> str:
    if result.peak_bytes is None or result.ratio is None:
        return str(result.failure)
    return f"{_size(result.peak_bytes, plain)}\ntime {result.ratio.median:.2f}x"


def _size(held: int, plain: int | None) -> str:
    over = f"\n{held / plain:.2f}x" if plain else ""
    return f"{held / MB:.0f} MB{over}"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, SIZES, rounds=3).parse_args(arguments)
    device = torch.device(options.device)
    warnings.filterwarnings(
        "ignore", message="There is a performance drop"
    )  # from vmap; its time shows it
    sizes = [
        (name, (2, 2) if options.quick else size)
        for name in options.models
        for size in SIZES[name][: 1 if options.quick else None]
    ]
    workloads = [
        measure(name, TASKS[name], size, rounds_of(options), device)
        for name, size in track(sizes, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, workloads)
    print_table(workloads, caption(head))


if __name__ == "__main__":
    main()
