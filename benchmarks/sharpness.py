"""What a sharpness-aware step costs, over a plain step of torch on the same N samples.

A plain step of torch is a forward pass, a backward pass and ``torch.optim.SGD`` with momentum. SAM
needs the gradient twice, so 2 is the floor, which SAM written by hand in torch is there to show.
Our own plain step, with one row of all samples and with M rows, shows what of the rest is SAM's.
torch's optimizers work in place, so ours do too (``donate=True``), and once they do not.

    python benchmarks/sharpness.py
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# The profiler, which counts the memory, otherwise reports its every start; read by torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track

if not __package__:  # run as a file: make the folder around it the package it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS
from benchmarks._race import race
from benchmarks._report import table
from benchmarks._results import Contest, save
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender
from benchmarks._torch_steps import plain_step, sam_step

NAME = Path(__file__).stem
MODELS = ("mlp", "resnet18")
SAMPLES = 128
RHO, ALPHA = 0.05, 0.4
SHARP = {
    "plain": (),
    "SAM": (gf.sam_perturb(RHO),),
    "GSAM": (gf.sam_perturb(RHO), gf.gsam_decompose(ALPHA)),
}
BASE, HAND = "torch", "torch, SAM by hand"


@dataclass(frozen=True)
class Way:
    """How our steps are taken; each way runs against torch in a race of its own.

    With few contenders: what one leaves behind in the memory allocator, the next one pays for.
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
    """Two steps of torch, and ours, none of whose rows is rejected."""
    entrants = {BASE: plain_step(setting), HAND: sam_step(setting, RHO)}
    for name, links in SHARP.items():
        # An lr of 0, as torch's steps here have: what is written in place stays as it is.
        update = gf.chain(way.reducer, *links, gf.sgd(0.0, momentum=0.9))
        entrants[name] = setting.step(way.microbatches, "auto", update, donate=way.donate)
    return entrants


def measure(name: str, way: Way, samples: int, rounds: int, device: torch.device) -> Contest:
    setting = Setting.of(TASKS[name], samples, device)
    results, _ = race(contenders(setting, way), rounds, device, base=BASE)
    return Contest(
        model=name,
        title=f"{TASKS[name].title}, N = {samples}, {way.title}",
        parameters=setting.size,
        results=results,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, MODELS).parse_args(arguments)
    device = torch.device(options.device)
    samples = 16 if options.quick else SAMPLES
    races = [(name, way) for name in options.models for way in WAYS]
    contests = [
        measure(name, way, samples, rounds_of(options), device)
        for name, way in track(races, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    names = (HAND, *SHARP)
    table(contests, names, caption(head), base=BASE, title="Over a plain step of torch")


if __name__ == "__main__":
    main()
