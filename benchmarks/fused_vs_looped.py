"""What microbatch gradients cost: each plan against one plain forward and backward pass.

Plain is a forward and a backward pass over all N = M·B samples at once. A plan computes the M rows
and answers what a filter asks of them: ``gram()`` and one ``combine(weights)``. Reported are the
time over plain, taken round by round, and the peak memory of new storage.

    python benchmarks/fused_vs_looped.py --device cpu
    python -m benchmarks.fused_vs_looped --quick --models mlp gpt
"""

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import get_args

# The profiler, which counts the memory, otherwise reports its every start; read by torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track

if not __package__:  # run as a file: make the folder around it the package it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._machine import machine
from benchmarks._memory import peak_bytes
from benchmarks._models import TASKS, Task, criterion
from benchmarks._report import chart, table
from benchmarks._results import Result, Workload
from benchmarks._timing import Contender, clock_for, interleave, reason
from gradfilter.grads._microbatch import Plan

# A plan that microbatch_grads learns is measured from then on.
PLANS = tuple(plan for plan in get_args(Plan) if plan != "auto")


def contenders(
    task: Task, microbatches: int, samples: int, device: torch.device
) -> dict[str, Contender]:
    """Plain and every plan, over the same model and the same data."""
    torch.manual_seed(0)
    model = task.model().to(device).train()
    inputs, targets = (t.to(device) for t in task.batch(microbatches * samples))
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    weights = torch.full((microbatches,), 1 / microbatches, device=device)

    def plain() -> None:
        criterion(model(inputs), targets).backward()
        # Freed at the end, not the start, so that no contender runs beside the others' gradients.
        model.zero_grad(set_to_none=True)

    def planned(plan: Plan) -> Contender:
        grads_of = gf.microbatch_grads(loss, microbatches, plan=plan)

        def ask() -> None:
            rows = grads_of(params, (inputs, targets), buffers=buffers)
            rows.gram()
            rows.combine(weights)

        return ask

    return {"plain": plain, **{plan: planned(plan) for plan in PLANS}}


def measure(
    name: str, task: Task, size: tuple[int, int], rounds: int, device: torch.device
) -> Workload:
    """Time all contenders, then take the memory of those that got through."""
    entrants = contenders(task, *size, device)
    timings = interleave(entrants, rounds, clock_for(device))
    results = {}
    for entrant, run in entrants.items():
        if entrant in timings.failures:
            results[entrant] = Result(failure=timings.failures[entrant])
            continue
        try:
            peak = peak_bytes(run, device)
        except Exception as error:
            results[entrant] = Result(failure=reason(error))
            continue
        ratio = timings.ratio_to("plain", entrant) if "plain" in timings.seconds else None
        results[entrant] = Result(timings.seconds_of(entrant), ratio, peak)
    parameters = sum(p.numel() for p in task.model().parameters())
    return Workload(name, task.title, *size, parameters, results)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, help="timed rounds (20; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="few rounds, one size per model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 20)
    device = torch.device(options.device)
    # vmap says that it has no batching rule for some operation on this device, and is slow there.
    # How slow is what is measured here.
    warnings.filterwarnings("ignore", message="There is a performance drop")

    sizes = [
        (name, size)
        for name in options.models
        for size in TASKS[name].workloads[: 1 if options.quick else None]
    ]
    workloads = [
        measure(name, TASKS[name], size, rounds, device)
        for name, size in track(sizes, "Measuring", console=Console(stderr=True))
    ]

    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"fused_vs_looped-{device.type}"
    settings = {**machine(device), "rounds": rounds, "quick": options.quick}
    contents = {"benchmark": "fused_vs_looped", **settings}
    contents["workloads"] = [asdict(workload) for workload in workloads]
    target.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n")
    about = "{device_name}, {threads} threads, torch {torch}, {rounds} rounds".format(**settings)
    chart(workloads, PLANS, about, target.with_suffix(".png"))
    table(workloads, PLANS, about)


if __name__ == "__main__":
    main()
