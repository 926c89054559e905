"""Measure the time of sharpness-aware steps; the base is a plain step of torch.

A plain step of torch is a forward pass, a backward pass and ``torch.optim.SGD`` with momentum, for
the same N samples. SAM needs two gradients, so its ratio is at least about 2; SAM written by hand
in torch shows this limit. Our own plain step, with one row of all samples and with M rows, shows
which part of the rest belongs to SAM. The optimizers of torch work in place, so ours do too
(``donate=True``), except in one race. The last race compares optimizers around SGD, ours and those
of pytorch_optimizer. Before it, all make a step in float64, and must reach the same parameters.

    python benchmarks/sharpness.py
"""

import copy
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS, criterion
from benchmarks._race import deferred, race
from benchmarks._report import by_contender, table
from benchmarks._results import Contest, save
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._sharpness_peers import ALPHA, MOMENTUM, OPTIMIZERS, RHO
from benchmarks._timing import Contender
from benchmarks._torch_steps import plain_step, sam_step

NAME = Path(__file__).stem
MODELS = ("mlp", "resnet18")
SAMPLES = 128
SHARP = {
    "plain": (),
    "SAM": (gf.sam_perturb(RHO),),
    "GSAM": (gf.sam_perturb(RHO), gf.gsam_decompose(ALPHA)),
}
BASE, HAND = "torch", "torch, SAM by hand"
AROUND = "optimizers"
TOLERANCE = 1e-6  # relative to the change of all parameters


@dataclass(frozen=True)
class Way:
    """One variant of our steps; each variant has its own race against torch.

    Every race has few contenders, because memory that one leaves in the allocator slows the next.
    """

    title: str
    microbatches: int
    reducer: gf.Transform
    donate: bool


WAYS = (
    Way("M = 1, in place", 1, gf.mean_rows(), True),
    Way("M = 1", 1, gf.mean_rows(), False),
    Way("M = 8, in place", 8, gf.mean_rows(), True),
    Way("M = 8, filtered, in place", 8, gf.agree_filter(THRESHOLD), True),
)


def contenders(setting: Setting, way: Way) -> dict[str, Contender]:
    """Return two steps of torch and our steps, which reject no row."""
    entrants = {BASE: plain_step(setting), HAND: sam_step(setting, RHO)}
    for name, transforms in SHARP.items():
        # The lr is 0, as in the steps of torch here, so steps in place do not change the
        # parameters.
        update = gf.chain(way.reducer, *transforms, gf.sgd(0.0, momentum=MOMENTUM))
        entrants[name] = setting.step(way.microbatches, "auto", update, donate=way.donate)
    return entrants


def optimizers(setting: Setting) -> dict[str, Contender]:
    """Return two steps of torch, our pure steps in place, and optimizers around SGD."""
    pure = contenders(setting, WAYS[0])
    entrants = {BASE: pure[BASE], HAND: pure[HAND]}
    for name, libraries in OPTIMIZERS.items():
        entrants[f"gradfilter: {name}"] = pure[name]
        for title, build in libraries.items():
            model = copy.deepcopy(setting.model)
            entrants[title] = deferred(partial(build, model, setting.batch, 0.0))
    return entrants


def check(setting: Setting, lr: float = 0.1) -> None:
    """Check that all optimizers reach the same parameters as gradfilter, in float64.

    Raises:
        ValueError: An optimizer reaches other parameters. If it cannot make a step, the race
        reports
            it.
    """
    inputs, targets = setting.batch
    batch = inputs.double(), targets
    begin = copy.deepcopy(setting.model).double()
    params, buffers = gf.extract(begin)
    rows = gf.microbatch_grads(gf.model_loss(begin, criterion), 1)(params, batch, buffers=buffers)
    for name, libraries in OPTIMIZERS.items():
        update = gf.chain(gf.mean_rows(), *SHARP[name], gf.sgd(lr, momentum=MOMENTUM))
        right = update(params, update.init(params), rows)[0]
        for title, build in libraries.items():
            model = copy.deepcopy(begin)
            try:
                build(model, batch, lr)()
            except Exception:
                continue
            difference = _off(model, right, begin)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"Expected the parameters of gradfilter after a step, found a relative "
                    f"difference of {difference:.1e} for {title}."
                )


@torch.no_grad()
def _off(model: nn.Module, right: dict[str, Tensor], begin: nn.Module) -> float:
    """Return the distance to the right parameters, divided by the length of the step."""
    start = dict(begin.named_parameters())
    off = sum((p - right[name]).square().sum() for name, p in model.named_parameters())
    way = sum((start[name] - p).square().sum() for name, p in right.items())
    return (off / way).sqrt().item()


def measure(name: str, way: Way | None, samples: int, rounds: int, device: torch.device) -> Contest:
    """Run one race; without a way, the race of optimizers around SGD."""
    setting = Setting.of(TASKS[name], samples, device)
    if way is None:
        check(setting)
    entrants = contenders(setting, way) if way else optimizers(setting)
    results, _ = race(entrants, rounds, device, base=BASE)
    return Contest(
        model=name,
        title=f"{TASKS[name].title}, N = {samples}, {way.title if way else AROUND}",
        parameters=setting.size,
        results=results,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, MODELS).parse_args(arguments)
    device = torch.device(options.device)
    samples = 16 if options.quick else SAMPLES
    races = [(name, way) for name in options.models for way in (*WAYS, None)]
    contests = [
        measure(name, way, samples, rounds_of(options), device)
        for name, way in track(races, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    names, over = (HAND, *SHARP), "Over a plain step of torch"
    around = [contest for contest in contests if contest.title.endswith(AROUND)]
    ways = [contest for contest in contests if contest not in around]
    table(ways, names, caption(head), base=BASE, title=over)
    by_contender(around, caption(head), base=BASE, title=over)


if __name__ == "__main__":
    main()
