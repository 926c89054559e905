"""Measure the time of the norm and the operator norm of a Jacobian, and that of loops and jacrev.

The model is a ResNet18 of width 16 without BatchNorm, with images of 32 x 32 in batches of 64, for
10 and for 100 classes. The loops run one backward pass per class. The published loop also computes
the gradients of the weights; the other loop does not. jacrev uses vmap over the samples. All three
store the Jacobian, and compute its norm or the largest eigenvalue of its Gram.

    python benchmarks/stats.py
"""

import os
import sys
from collections.abc import Callable
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

import gradfilter.diagnostics as gd
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._jacobians import WAYS, frobenius, spectral
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._timing import Contender
from gradfilter.lab.models._build import build_model

NAME = Path(__file__).stem
MODEL, SHAPE = "resnet18_16", (3, 32, 32)
CLASSES = ("10", "100")
SAMPLES = 64
BASE, _, JACREV = WAYS

Measure = Callable[[nn.Module, Tensor], Tensor]


def _operator_norm(method: str) -> Measure:
    return lambda model, x: gd.operator_norm(model, x, method=method).values


# By title: the function of the Jacobian that the others use, and our functions for the same.
MEASURES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Measure]]] = {
    "Frobenius norm": (frobenius, {"jacobian_norm": gd.jacobian_norm}),
    "operator norm": (
        spectral,
        {f"operator_norm, {method}": _operator_norm(method) for method in ("gram", "power")},
    ),
}


def contenders(title: str, model: nn.Module, x: Tensor) -> dict[str, Contender]:
    """Return all contenders for one measure on the same batch."""
    reduce, ours = MEASURES[title]
    others = {name: lambda way=way: reduce(way(model, x)) for name, way in WAYS.items()}
    return {**others, **{name: partial(measure, model, x) for name, measure in ours.items()}}


def measure(title: str, classes: str, samples: int, rounds: int, device: torch.device) -> Contest:
    torch.manual_seed(0)
    model = build_model(MODEL, classes=int(classes), shape=SHAPE).eval().to(device)
    entrants = contenders(title, model, torch.randn(samples, *SHAPE, device=device))
    results, timings = race(entrants, rounds, device, base=BASE)
    ours = MEASURES[title][1]
    return Contest(
        model=f"{MODEL}, C = {classes}",
        title=f"{title}, C = {classes}, N = {samples}",
        parameters=sum(p.numel() for p in model.parameters()),
        results=results,
        ratios={
            f"{name} / {JACREV}": timings.ratio_to(JACREV, name)
            for name in ours
            if {name, JACREV} <= timings.seconds.keys()
        },
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, CLASSES, called="classes", rounds=3).parse_args(arguments)
    device = torch.device(options.device)
    samples = 2 if options.quick else SAMPLES
    races = [(title, classes) for classes in options.classes for title in MEASURES]
    contests = [
        measure(title, classes, samples, rounds_of(options), device)
        for title, classes in track(races, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    by_contender(contests, caption(head), base=BASE, title="Over the published loop")


if __name__ == "__main__":
    main()
