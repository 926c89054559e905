"""The cases of the GPU benchmark: each prints a table and returns its results for the JSON."""

import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import gradfilter as gf
from benchmarks import fused_vs_looped, memory
from benchmarks._conv_cases import convolutions
from benchmarks._gpu_models import checkpointed, tasks
from benchmarks._models import TASKS
from benchmarks._plans import PLANS
from benchmarks._race import deferred, race
from benchmarks._report import by_contender, table
from benchmarks._results import Contest
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._tf32 import tf32_off
from benchmarks._timing import Contender, reason

MODELS = ("resnet18", "resnet50", "vit", "gpt2", "gpt")
UPDATE = gf.chain(gf.agree_filter(THRESHOLD), gf.sgd(0.1, momentum=0.9))


@dataclass(frozen=True)
class Options:
    """The device, the number of rounds, whether the run is quick, and when rounds end."""

    device: torch.device
    rounds: int
    quick: bool
    until: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The size (M, B) of the cases that are not about large models."""
        return (2, 2) if self.quick else (8, 16)


Case = Callable[[Options], dict[str, Any]]


def plans(name: str, options: Options, *, bf16: bool = False) -> dict[str, Any]:
    """Measure every plan, a whole step and the published step on one model."""
    task = tasks(quick=options.quick)[name]
    (size,) = task.workloads
    workload = fused_vs_looped.measure(
        name, task, size, options.rounds, options.device, bf16=bf16, until=options.until
    )
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
    setting, step = _step(name, options)
    state = step.init(setting.model)
    entrants = {
        "plain": setting.plain,
        "step": lambda: step(state, setting.batch),
        "captured": deferred(
            lambda: partial(gf.capture(step, state, setting.batch), setting.batch)
        ),
    }
    return _contest(name, setting, entrants, options, over="step")


def _step(name: str, options: Options) -> tuple[Setting, gf.TrainStep]:
    """Return a model with its data, and a step of plan "fused"."""
    microbatches, samples = options.size
    setting = Setting.of(TASKS[name], microbatches * samples, options.device)
    return setting, gf.train_step(setting.loss, UPDATE, microbatches=microbatches, plan="fused")


def _contest(
    name: str,
    setting: Setting,
    entrants: dict[str, Contender],
    options: Options,
    *,
    over: str,
    title: str | None = None,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Measure contenders, also by the time of one of them over the time of each other one."""
    results, timings = race(
        entrants, options.rounds, options.device, base="plain", until=options.until
    )
    others = [other for other in timings.seconds if other not in ("plain", over)]
    contest = Contest(
        model=name,
        title=title or TASKS[name].title,
        parameters=setting.size,
        results=results,
        ratios={f"{over} / {other}": timings.ratio_to(other, over) for other in others}
        if over in timings.seconds
        else {},
    )
    by_contender([contest], "M = {}, B = {}".format(*(size or options.size)))
    return asdict(contest)


def compiled(name: str, options: Options) -> dict[str, Any]:
    """Measure a step in one graph: as traced, compiled by Inductor, and as its CUDA graphs.

    A CPU runs only the graph as traced: Inductor's code for it needs a minute and a C++ compiler.
    """
    setting, step = _step(name, options)
    state = step.init(setting.model)
    first: dict[str, float] = {}

    def entrant(label: str, backend: Any) -> Contender:
        def build() -> Contender:
            run = gf.compile(step, backend=backend)
            start = time.perf_counter()
            run(state, setting.batch)
            first[label] = time.perf_counter() - start
            return lambda: run(state, setting.batch)

        return deferred(build)

    backends: dict[str, Any] = {"graph": "graph"}
    if options.device.type == "cuda":
        backends |= {"compiled": "inductor", "compiled, CUDA graphs": _by_cuda_graphs}
    entrants = {
        "plain": setting.plain,
        "step": lambda: step(state, setting.batch),
        **{label: entrant(label, backend) for label, backend in backends.items()},
    }
    return {**_contest(name, setting, entrants, options, over="step"), "first_call": first}


def _by_cuda_graphs(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """Compile a graph to kernels that a CUDA graph launches; its results are copied out."""
    run = torch.compile(graph, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def fresh(*tensors: torch.Tensor) -> list[Any]:
        torch.compiler.cudagraph_mark_step_begin()
        return [r.clone() if isinstance(r, torch.Tensor) else r for r in run(*tensors)]

    return fresh


def sharp_rows(name: str, options: Options) -> dict[str, Any]:
    """Measure SAM along the mean gradient, and along the gradient of each row by every plan."""
    microbatches, samples = options.size
    setting = Setting.of(TASKS[name], microbatches * samples, options.device)
    rule = gf.mean_rows(), gf.sgd(0.1, momentum=0.9)
    mean = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1, momentum=0.9))
    rows = gf.chain(gf.sam_perturb(0.05, per_microbatch=True), *rule)
    entrants = {
        "plain": setting.plain,
        "SAM": setting.step(microbatches, "fused", mean),
        **{f"{plan}, SAM per row": setting.step(microbatches, plan, rows) for plan in PLANS},
    }
    return _contest(name, setting, entrants, options, over="loop, SAM per row")


def recomputed(name: str, options: Options) -> dict[str, Any]:
    """Measure a model with activation checkpointing, and the same model without it.

    A plan that refuses checkpoints is a failure with its reason; "auto" then takes another plan,
    and the reason is kept.
    """
    task = tasks(quick=options.quick)[name]
    ((microbatches, samples),) = task.workloads
    whole = Setting.of(task, microbatches * samples, options.device)
    saving = Setting.of(checkpointed(task), microbatches * samples, options.device)
    entrants = {
        "plain": saving.plain,
        "plain, no checkpoints": whole.plain,
        "fused, no checkpoints": whole.step(microbatches, "fused", UPDATE),
        **{plan: saving.step(microbatches, plan, UPDATE) for plan in ("auto", *PLANS)},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        title = f"{task.title}, checkpointed"
        size = (microbatches, samples)
        found = _contest(name, saving, entrants, options, over="loop", title=title, size=size)
    told = [str(warning.message) for warning in caught]
    return {**found, "warnings": sorted({text.splitlines()[0] for text in told})}


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
    **{f"sam-rows-{name}": partial(sharp_rows, name) for name in ("mlp", "resnet18", "gpt")},
    **{f"checkpointed-{name}": partial(recomputed, name) for name in ("vit", "gpt")},
    "conv": routes,
    "memory": most_memory,
    # Last, because a compiler takes as long as it takes: what remains of the time is theirs.
    **{f"compiled-{name}": partial(compiled, name) for name in ("mlp", "gpt", "resnet18")},
}
