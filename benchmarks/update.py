"""What one update of all parameters costs, over torch.optim on the same gradients.

Gradients are there already: what is timed is clipping, the update rule, and the new parameters.
"Gated" means that the step may be skipped (``keep``), as it may behind every filter; "donated" that
the results are written into the old tensors, which is what torch.optim does. The others leave all
they are given as it was, and so make new parameters and a new state.

    python benchmarks/update.py
    python benchmarks/update.py --rules adamw
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# The profiler, which counts the memory, otherwise reports its every start; read by torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the folder around it the package it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import deferred, race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._timing import Contender

NAME = Path(__file__).stem
Shapes = dict[str, torch.Size]
Tree = dict[str, Tensor]

LR, CLIPPING = 1e-4, 0.01
RULES: dict[str, Callable[[], gf.Transform]] = {
    "agc_clip + sgd": lambda: gf.chain(gf.agc_clip(CLIPPING), gf.sgd(LR, momentum=0.9)),
    "sgd": lambda: gf.sgd(LR, momentum=0.9),
    "adamw": lambda: gf.adamw(LR),
}
WAYS = {
    "ours": {},
    "ours, gated": {"gated": True},
    "ours, donated": {"donate": True},
    "ours, gated, donated": {"gated": True, "donate": True},
}
COMPILED = {"ours, gated, compiled": {"gated": True, "compiled": True}}
TIMM = "timm + torch"
BASE = "torch"


def random_tree(shapes: Shapes, size: float, seed: int, device: torch.device) -> Tree:
    g = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=g).to(device) for name, shape in shapes.items()
    }


def ours(
    rule: str,
    shapes: Shapes,
    device: torch.device,
    *,
    gated: bool = False,
    donate: bool = False,
    compiled: bool = False,
) -> Contender:
    """Steps of ours, each from where the last one ended."""
    update = RULES[rule]()
    params, grads = (random_tree(shapes, s, i, device) for i, s in enumerate((0.05, 0.01)))
    now = [params, update.init(params)]
    extra = {"keep": torch.ones((), dtype=torch.bool, device=device)} if gated else {}
    apply = torch.compile(update, fullgraph=True) if compiled else update

    def step() -> None:
        now[:] = apply(*now, grads, donate=donate, **extra)[:2]

    return step


def of_torch(rule: str, shapes: Shapes, device: torch.device, *, clip: bool = False) -> Contender:
    """Steps of torch.optim on lists of tensors, behind timm's clipping or not."""
    if clip:
        from timm.utils.agc import adaptive_clip_grad

    params, grads = (random_tree(shapes, s, i, device) for i, s in enumerate((0.05, 0.01)))
    leaves = [nn.Parameter(p) for p in params.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g
    optimizer = (
        torch.optim.AdamW(leaves, lr=LR, foreach=True)
        if rule == "adamw"
        else torch.optim.SGD(leaves, lr=LR, momentum=0.9, foreach=True)
    )

    def step() -> None:
        if clip:
            adaptive_clip_grad(leaves, CLIPPING)
        optimizer.step()

    return step


def measure(
    rule: str, model: nn.Module, rounds: int, device: torch.device, *, quick: bool
) -> Contest:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    entrants = {BASE: of_torch(rule, shapes, device)}
    clips = "agc" in rule
    if clips:
        entrants[TIMM] = deferred(lambda: of_torch(rule, shapes, device, clip=True))
    ways = WAYS if quick or not clips else WAYS | COMPILED
    for name, options in ways.items():
        entrants[name] = deferred(lambda options=options: ours(rule, shapes, device, **options))
    results, timings = race(entrants, rounds, device, base=BASE)
    timed = [name for name in ways if {TIMM, name} <= set(timings.seconds)]
    return Contest(
        model=rule,
        title=f"{rule}, {len(shapes)} tensors",
        parameters=sum(shape.numel() for shape in shapes.values()),
        results=results,
        ratios={f"{TIMM} / {name}": timings.ratio_to(name, TIMM) for name in timed},
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, RULES, called="rules").parse_args(arguments)
    device = torch.device(options.device)
    with torch.device("meta"):
        model = torchvision.models.resnet18() if options.quick else torchvision.models.resnet50()
    contests = [
        measure(rule, model, rounds_of(options), device, quick=options.quick)
        for rule in track(options.rules, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    by_contender(contests, caption(head), base=BASE, title="Over torch.optim with foreach")


if __name__ == "__main__":
    main()
