"""What a sharpness-aware step costs, over a plain step of torch on the same N samples.

A plain step of torch is a forward pass, a backward pass and ``torch.optim.SGD`` with momentum. SAM
needs the gradient twice, so 2 is the floor, which SAM written by hand in torch is there to show.
Our own plain step, with one row of all samples and with M rows, shows what of the rest is SAM's.
torch's optimizers work in place, so ours do too (``donate=True``), and once they do not.

    python benchmarks/sharpness.py
"""

import os
import sys
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
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender
from benchmarks._torch_steps import plain_step, sam_step

NAME = Path(__file__).stem
MODELS = ("mlp", "resnet18")
SAMPLES, MICROBATCHES = 128, 8
RHO, ALPHA = 0.05, 0.4
BASE = "torch"


def contenders(setting: Setting) -> dict[str, Contender]:
    """Two steps of torch, and ours: in place and not, and of M rows of which none is rejected."""
    entrants = {BASE: plain_step(setting), "torch, SAM by hand": sam_step(setting, RHO)}
    sharp = {
        "plain": (),
        "SAM": (gf.sam_perturb(RHO),),
        "GSAM": (gf.sam_perturb(RHO), gf.gsam_decompose(ALPHA)),
    }
    for reducer, microbatches, donate, what in (
        (gf.mean_rows(), 1, True, "M = 1, in place"),
        (gf.mean_rows(), 1, False, "M = 1"),
        (gf.mean_rows(), MICROBATCHES, True, "M = 8, in place"),
        (gf.agree_filter(THRESHOLD), MICROBATCHES, True, "M = 8, filtered, in place"),
    ):
        for name, links in sharp.items():
            # An lr of 0, as torch's steps here have: what is written in place stays as it is.
            update = gf.chain(reducer, *links, gf.sgd(0.0, momentum=0.9))
            step = setting.step(microbatches, "auto", update, donate=donate)
            entrants[f"{name}, {what}"] = step
    return entrants


def measure(name: str, samples: int, rounds: int, device: torch.device) -> Contest:
    setting = Setting.of(TASKS[name], samples, device)
    results, _ = race(contenders(setting), rounds, device, base=BASE)
    return Contest(
        model=name,
        title=f"{TASKS[name].title}, N = {samples}",
        parameters=setting.size,
        results=results,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, MODELS).parse_args(arguments)
    device = torch.device(options.device)
    samples = 2 * MICROBATCHES if options.quick else SAMPLES
    contests = [
        measure(name, samples, rounds_of(options), device)
        for name in track(options.models, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    by_contender(contests, caption(head), base=BASE, title="Over a plain step of torch")


if __name__ == "__main__":
    main()
