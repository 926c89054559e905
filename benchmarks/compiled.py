"""Measure whole compiled training steps; the base is a whole step of torch, not compiled.

A step of torch is a forward pass, a backward pass and ``torch.optim.SGD`` with momentum. Ours
computes M rows, their Gram, the agreement filter and the same update rule, in place as torch does
(``donate=True``): as it is, as the traced graph without a compiler (``backend="graph"``), and
compiled. "torch, compiled" is the same step of torch under ``torch.compile``. Before the
measurement all of our steps must change the parameters alike. The seconds of the first call, which
traces and compiles, are a part of the results; the caches of the compiler are empty then.

    python benchmarks/compiled.py --models mlp lenet
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS, criterion
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, Workload, save
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender

NAME = Path(__file__).stem
LR, MOMENTUM = 1e-3, 0.9
BASE, COMPILED_BASE = "torch", "torch, compiled"
EAGER, GRAPH, COMPILED = "eager", "graph", "compiled"
TOLERANCE = 1e-2  # of the change of the parameters in a step, in float32

SIZES = {
    "mlp": ((8, 16), (32, 4), (128, 1)),
    "lenet": ((128, 1),),
    "resnet18": ((8, 16), (16, 8)),
    "vit": ((8, 16),),
    "gpt": ((8, 4),),
}
"""The numbers of rows, and of samples in each."""


@dataclass(frozen=True, kw_only=True)
class CompiledWorkload(Workload):
    """A model at one size.

    Attributes:
        first_call_seconds: The time of the first call of a compiled contender, by name.
    """

    first_call_seconds: dict[str, float] = field(default_factory=dict)


def torch_step(setting: Setting, *, compiled: bool) -> Contender:
    """Return a step of torch; if compiled, loss, backward pass and optimizer are."""
    model = copy.deepcopy(setting.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    inputs, targets = setting.batch

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return criterion(model(inputs), targets)

    loss, move = (loss_of, optimizer.step)
    if compiled:
        loss, move = torch.compile(loss_of), torch.compile(optimizer.step)

    def step() -> None:
        loss(inputs, targets).backward()
        move()
        optimizer.zero_grad()

    return step


def own_step(setting: Setting, microbatches: int, backend: str | None) -> Callable[[], gf.Params]:
    """Return a step of ours in place, which returns its parameters."""
    update = gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(LR, momentum=MOMENTUM))
    step = gf.train_step(setting.loss, update, microbatches=microbatches)
    run = step if backend is None else gf.compile(step, backend=backend)
    state = run.init(copy.deepcopy(setting.model))

    def advance() -> gf.Params:
        nonlocal state
        state, _ = run(state, setting.batch, donate=True)
        return state["params"]

    return advance


def contenders(setting: Setting, microbatches: int, backend: str) -> dict[str, Contender]:
    """Return the steps of torch and ours."""
    return {
        BASE: torch_step(setting, compiled=False),
        COMPILED_BASE: torch_step(setting, compiled=True),
        EAGER: own_step(setting, microbatches, None),
        GRAPH: own_step(setting, microbatches, "graph"),
        COMPILED: own_step(setting, microbatches, backend),
    }


def first_calls(setting: Setting, entrants: dict[str, Contender]) -> dict[str, float]:
    """Run every contender once; return how long the compiled ones took.

    Raises:
        AssertionError: Our steps do not change the parameters alike.
    """
    seconds, changes = {}, {}
    for name, run in entrants.items():
        start = time.perf_counter()
        params = run()
        if name in (COMPILED_BASE, GRAPH, COMPILED):
            seconds[name] = time.perf_counter() - start
        if isinstance(params, dict):
            changes[name] = {key: p - setting.params[key] for key, p in params.items()}
    right = changes[EAGER]
    for name, change in changes.items():
        off = sum((change[key] - want).square().sum() for key, want in right.items())
        length = sum(want.square().sum() for want in right.values())
        error = float((off / length).sqrt())
        if not error < TOLERANCE:
            raise AssertionError(
                f'Expected the step of "{EAGER}", found another of "{name}": {error:.1e} apart.'
            )
    return seconds


def measure(
    name: str, size: tuple[int, int], rounds: int, device: torch.device, backend: str
) -> CompiledWorkload:
    """Measure all steps on one model at one size (M, B); the compiler starts with empty caches."""
    from torch._inductor.utils import fresh_cache  # heavy, and needed by no other benchmark

    microbatches, samples = size
    setting = Setting.of(TASKS[name], microbatches * samples, device)
    torch.compiler.reset()
    entrants = contenders(setting, microbatches, backend)
    with fresh_cache():  # a cached graph would not show how long compiling takes
        seconds = first_calls(setting, entrants)
        results, timings = race(entrants, rounds, device, base=BASE)
    ratios = {}
    if {COMPILED, COMPILED_BASE} <= timings.seconds.keys():
        ratios[f"{COMPILED} / {COMPILED_BASE}"] = timings.ratio_to(COMPILED_BASE, COMPILED)
    return CompiledWorkload(
        model=name,
        title=TASKS[name].title,
        parameters=setting.size,
        results=results,
        ratios=ratios,
        microbatches=microbatches,
        samples_per_microbatch=samples,
        first_call_seconds=seconds,
    )


def command() -> argparse.ArgumentParser:
    """Return the parser of this benchmark, which also takes a backend."""
    options = parser(__doc__ or "", SIZES)
    options.add_argument("--backend", choices=["inductor", "graph"], default="inductor")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = command().parse_args(arguments)
    device = torch.device(options.device)
    sizes = [
        (name, size)
        for name in options.models
        for size in SIZES[name][: 1 if options.quick else None]
    ]
    workloads: list[Contest] = []
    for name, size in track(sizes, "Measuring", console=Console(stderr=True)):
        workloads.append(measure(name, size, rounds_of(options), device, options.backend))
    head = facts(NAME, options) | {"backend": options.backend}
    save(options.out / f"{NAME}-{device.type}.json", head, workloads)
    by_contender(workloads, caption(head), base=BASE, title="Over a whole step of torch")


if __name__ == "__main__":
    main()
