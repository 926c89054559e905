"""Measure the time of one update of all parameters; the base is torch.optim.

The gradients are given. The measured time includes clipping, the update rule and the new
parameters. "Gated": the step may be skipped (``keep``), as after every filter. "Donated": the
results are written into the old tensors, as torch.optim does. The other contenders do not change
their arguments, so they allocate new parameters and a new state.

    python benchmarks/update.py
    python benchmarks/update.py --rules adamw
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import deferred, race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._update_peers import CLIPS, TIMM

NAME = Path(__file__).stem
Shapes = dict[str, torch.Size]
Tree = dict[str, Tensor]
Step = Callable[[], list[Tensor]]  # makes a step and returns the parameters

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
BASE = "torch"
TORCH = {  # the implementation of torch.optim
    BASE: {"foreach": True},
    "torch, fused": {"fused": True},
    "torch, for loop": {"foreach": False},  # the default of torch on a CPU
}
# One parameter of each kind in the measured models, because units depend on the kind.
CHECKED = {"conv": torch.Size((4, 3, 2, 2)), "linear": torch.Size((5, 7)), "bias": torch.Size((5,))}
TOLERANCE = 1e-4  # relative to the change of all parameters


def random_tree(shapes: Shapes, size: float, seed: int, device: torch.device) -> Tree:
    g = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=g).to(device) for name, shape in shapes.items()
    }


def start(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tree, Tree]:
    """Return parameters and gradients, the same for all contenders."""
    trees = (random_tree(shapes, size, seed, device) for seed, size in enumerate((0.05, 0.01)))
    params, grads = ({name: t.to(dtype) for name, t in tree.items()} for tree in trees)
    return params, grads


def ours(
    rule: str,
    shapes: Shapes,
    device: torch.device,
    *,
    gated: bool = False,
    donate: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Return a function for steps of gradfilter; each continues from the previous step."""
    update = RULES[rule]()
    params, grads = start(shapes, device, dtype)
    now = [params, update.init(params)]
    extra = {"keep": torch.ones((), dtype=torch.bool, device=device)} if gated else {}
    apply = torch.compile(update, fullgraph=True) if compiled else update

    def step() -> list[Tensor]:
        now[:] = apply(*now, grads, donate=donate, **extra)[:2]
        return list(now[0].values())

    return step


def of_torch(
    rule: str,
    shapes: Shapes,
    device: torch.device,
    *,
    clip: str | None = None,
    dtype: torch.dtype = torch.float32,
    **implementation: bool,
) -> Step:
    """Return a function for steps of torch.optim, with a library's clipping or without."""
    params, grads = start(shapes, device, dtype)
    leaves = [nn.Parameter(p) for p in params.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g
    optimizer = (
        torch.optim.AdamW(leaves, lr=LR, **implementation)
        if rule == "adamw"
        else torch.optim.SGD(leaves, lr=LR, momentum=0.9, **implementation)
    )
    clipped = CLIPS[clip](leaves, optimizer, CLIPPING) if clip else None

    def step() -> list[Tensor]:
        if clipped:
            clipped()
        optimizer.step()
        return leaves

    return step


def builders(rule: str, *, compiled: bool) -> dict[str, Callable[..., Step]]:
    """Return builders of all contenders for an update rule; those of torch alone do not clip."""
    clips = "agc" in rule
    found: dict[str, Callable[..., Step]] = {
        name: partial(of_torch, rule, **how) for name, how in TORCH.items()
    }
    if clips:
        found |= {name: partial(of_torch, rule, clip=name, foreach=True) for name in CLIPS}
    ways = WAYS | COMPILED if clips and compiled else WAYS
    return found | {name: partial(ours, rule, **options) for name, options in ways.items()}


def check(rule: str, device: torch.device) -> None:
    """Check that all contenders reach the same parameters as gradfilter, in float64.

    Raises:
        ValueError: A contender reaches other parameters. If it cannot make a step, the race reports
            it.
    """
    entrants = builders(rule, compiled=False)
    if "agc" in rule:
        entrants = {name: build for name, build in entrants.items() if name not in TORCH}
    begin = _flat(start(CHECKED, device, torch.float64)[0].values())
    ends = {}
    for name, build in entrants.items():
        try:
            step = build(CHECKED, device, dtype=torch.float64)
            ends[name] = _flat([step() for _ in range(3)][-1])
        except Exception:
            continue
    right = ends["ours"]
    for name, end in ends.items():
        difference = ((end - right).norm() / (right - begin).norm()).item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{rule}: expected the parameters of gradfilter after three steps, found a "
                f"relative difference of {difference:.1e} for {name}."
            )


def _flat(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def measure(
    rule: str, model: nn.Module, rounds: int, device: torch.device, *, quick: bool
) -> Contest:
    check(rule, device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    entrants = {
        name: deferred(partial(build, shapes, device))
        for name, build in builders(rule, compiled=not quick).items()
    }
    results, timings = race(entrants, rounds, device, base=BASE)
    timed = [name for name in entrants if "ours" in name and {TIMM, name} <= set(timings.seconds)]
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
