"""The cases of the GPU benchmark: each prints a table and returns its results for the JSON."""

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import gradfilter as gf
from benchmarks import fused_vs_looped, memory
from benchmarks._conv_cases import convolutions
from benchmarks._gpu_models import tasks
from benchmarks._models import TASKS
from benchmarks._race import deferred, race
from benchmarks._report import by_contender, table
from benchmarks._results import Contest
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._tf32 import tf32_off
from benchmarks._timing import reason

MODELS = ("resnet18", "resnet50", "vit", "gpt2", "gpt")
UPDATE = gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(0.1, momentum=0.9))


@dataclass(frozen=True)
class Options:
    """The device, the number of rounds, and whether the run is quick."""

    device: torch.device
    rounds: int
    quick: bool


Case = Callable[[Options], dict[str, Any]]


def plans(name: str, options: Options, *, bf16: bool = False) -> dict[str, Any]:
    """Measure every plan, a whole step and the published step on one model."""
    task = tasks(quick=options.quick)[name]
    (size,) = task.workloads
    workload = fused_vs_looped.measure(name, task, size, options.rounds, options.device, bf16=bf16)
    names = [contender for contender in workload.results if contender != "plain"]
    table([workload], names, "bfloat16 autocast" if bf16 else "float32")
    try:
        differences = _differences(name, options, bf16)
    except Exception as error:
        differences = {"failure": reason(error)}
    return {**asdict(workload), "bf16": bf16, "gram_difference": differences}


def _differences(name: str, options: Options, bf16: bool) -> dict[str, float]:
    """Return the relative difference of the fused Gram from the loop, with and without TF32."""
    task = tasks(quick=options.quick)[name]
    ((microbatches, samples),) = task.workloads
    setting = Setting.of(task, microbatches * samples, options.device, bf16=bf16)

    def difference() -> float:
        ours, loop = (setting.rows(microbatches, plan)().gram() for plan in ("fused", "loop"))
        return ((ours - loop).norm() / loop.norm()).item()

    found = {"as configured": difference()}
    with tf32_off():
        found["without TF32"] = difference()
    return found


def captured(name: str, options: Options) -> dict[str, Any]:
    """Measure a step as a CUDA graph, and the same step with one launch per kernel."""
    microbatches, samples = (2, 2) if options.quick else (8, 16)
    setting = Setting.of(TASKS[name], microbatches * samples, options.device)
    step = gf.train_step(setting.loss, UPDATE, microbatches=microbatches, plan="fused")
    state = step.init(setting.model)
    entrants = {
        "plain": setting.plain,
        "step": lambda: step(state, setting.batch),
        "captured": deferred(
            lambda: partial(gf.capture(step, state, setting.batch), setting.batch)
        ),
    }
    results, timings = race(entrants, options.rounds, options.device, base="plain")
    ratios = {}
    if "captured" in timings.seconds:
        ratios = {"step / captured": timings.ratio_to("captured", "step")}
    contest = Contest(
        model=name,
        title=TASKS[name].title,
        parameters=setting.size,
        results=results,
        ratios=ratios,
    )
    by_contender([contest], f"M = {microbatches}, B = {samples}")
    return asdict(contest)


def waits(name: str, options: Options) -> dict[str, Any]:
    """Check whether a step makes the host wait for the device, and where."""
    if options.device.type != "cuda":
        return {"failure": "needs a CUDA device"}
    setting = Setting.of(TASKS[name], 32, options.device)
    step = setting.step(8, "fused", UPDATE)
    step()  # the first call initialises libraries, and may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "gradfilter" in f.filename
        ]
        where = f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "elsewhere"
        return {"waits": True, "reason": reason(error), "where": where}
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return {"waits": False}


def most_memory(options: Options) -> dict[str, Any]:
    """Run the memory benchmark for ResNet18 with many rows."""
    sizes = ((2, 2),) if options.quick else memory.SIZES["resnet18"]
    task = TASKS["resnet18"]
    workloads = [memory.measure("resnet18", task, s, options.rounds, options.device) for s in sizes]
    memory.print_table(workloads, "")
    return {"workloads": [asdict(workload) for workload in workloads]}


def routes(options: Options) -> dict[str, Any]:
    """Measure the routes to the weight gradients of convolutions, layer by layer."""
    microbatches = 2 if options.quick else 8
    found = {}
    for name in ("resnet18",) if options.quick else ("resnet18", "resnet50"):
        task = tasks(quick=options.quick)[name]
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[key] = convolutions(
                key, task, microbatches, dtype, options.rounds, options.device
            )
    return found


CASES: dict[str, Case] = {
    **{name: partial(plans, name) for name in MODELS},
    **{f"{name}-bf16": partial(plans, name, bf16=True) for name in MODELS},
    **{f"captured-{name}": partial(captured, name) for name in ("mlp", "resnet18")},
    **{f"waits-{name}": partial(waits, name) for name in ("mlp", "resnet18", "gpt")},
    "conv": routes,
    "memory": most_memory,
}
