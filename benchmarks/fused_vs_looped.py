"""Measure steps with filtered microbatch gradients; the base is a plain forward and backward pass.

Plain is one forward and backward pass for all N = M·B samples. A plan computes the M rows, their
Gram, the agreement filter and the weighted sum of all rows. Two contenders are whole steps, which
also change the parameters by SGD with momentum: ``step_GAF`` of the published package, and ours for
comparison. "by hand", of the MLP alone, is the computation of a plan written for this one model in
few calls of torch. The results are the time over plain, computed within each round, and the peak
memory of new storage.

    python benchmarks/fused_vs_looped.py --device cpu
    python -m benchmarks.fused_vs_looped --quick --models mlp gpt
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

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._by_hand import by_hand
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS, Task
from benchmarks._plans import PLANS
from benchmarks._race import deferred, race
from benchmarks._report import chart, table
from benchmarks._results import Workload, load, save
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender

NAME = Path(__file__).stem
BY_HAND = "by hand"
STEP = "fused step"
PUBLISHED = "step_GAF"
COMPARED = ((PUBLISHED, STEP), (PUBLISHED, "fused"))


def contenders(setting: Setting, microbatches: int) -> dict[str, Contender]:
    """Return plain, every plan and a whole step of ours, for the same model and data."""
    update = gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(0.1, momentum=0.9))
    return {
        "plain": setting.plain,
        **{plan: setting.filtered(microbatches, plan) for plan in PLANS},
        STEP: setting.step(microbatches, "fused", update),
    }


def measure(
    name: str,
    task: Task,
    size: tuple[int, int],
    rounds: int,
    device: torch.device,
    *,
    bf16: bool = False,
    until: float | None = None,
) -> Workload:
    """Measure all contenders on one model at one size (M, B)."""
    microbatches, samples = size
    setting = Setting.of(task, microbatches * samples, device, bf16=bf16)
    entrants = contenders(setting, microbatches)
    if name == "mlp":
        entrants[BY_HAND] = by_hand(setting, microbatches)
    if task.classifies and samples > 1:  # it needs more than one sample per row
        entrants[PUBLISHED] = deferred(lambda: setting.published(microbatches))
    results, timings = race(entrants, rounds, device, base="plain", until=until)
    ratios = {
        f"{a} / {b}": timings.ratio_to(b, a)
        for a, b in COMPARED
        if a in timings.seconds and b in timings.seconds
    }
    return Workload(
        model=name,
        title=task.title,
        parameters=setting.size,
        results=results,
        ratios=ratios,
        microbatches=microbatches,
        samples_per_microbatch=samples,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, TASKS).parse_args(arguments)
    device = torch.device(options.device)
    # vmap warns that it has no batching rule for an operation on this device and is slow. The
    # benchmark measures how slow.
    warnings.filterwarnings("ignore", message="There is a performance drop")

    sizes = [
        (name, size)
        for name in options.models
        for size in TASKS[name].workloads[: 1 if options.quick else None]
    ]
    workloads = [
        measure(name, TASKS[name], size, rounds_of(options), device)
        for name, size in track(sizes, "Measuring", console=Console(stderr=True))
    ]

    head = facts(NAME, options)
    target = options.out / f"{NAME}-{device.type}.json"
    save(target, head, workloads)
    names = (*PLANS, BY_HAND, STEP, PUBLISHED)
    table(workloads, names, caption(head))
    everything = sorted(load(target), key=lambda workload: list(TASKS).index(workload.model))
    chart(everything, names, caption(head), target.with_suffix(".png"))


if __name__ == "__main__":
    main()
