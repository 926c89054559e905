"""Measure SAM that perturbs every row along its own gradient; the base is one plain pass.

A plain pass is an ordinary forward and backward pass over the same samples. "products" is
``sam_perturb(per_microbatch=True)``, which adds products of what went into a layer and what came
back. "M sets of parameters" computes the parameters of every row and evaluates them with
``at_rows``, as this library did before. "loop" is the same transform on rows of plan "loop".
"products, compiled" is a whole step of "products" with ``sgd``, compiled. Before the measurement
all compute in float64, and must agree. In float32 they need not: rounding decides which ReLUs of
ResNet18 are on, and one of them changes a whole row. Devices without float64 compare only the
compiled step with "products".

    python benchmarks/rows_along.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, Workload, save

NAME = Path(__file__).stem
RHO, CLASSES = 0.05, 10
PRODUCTS, COMPILED = "products", "products, compiled"
TOLERANCE = 1e-10  # relative, in float64
SINGLE_TOLERANCE = 1e-3  # relative, in float32


@dataclass(frozen=True)
class Rows:
    """A model, and how many rows of how many samples it is given.

    Attributes:
        title: The model's name.
        build: Makes the model.
        shape: The shape of a sample.
        rows: M.
        samples: B.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int
    samples: int = 1


def perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for d, p in pairwise(widths):
        layers += [nn.Linear(d, p), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


CASES = {
    "mlp-small": Rows("MLP 64-256-256-10", lambda: perceptron(64, 256, 256, CLASSES), (64,), 80),
    "mlp": Rows("MLP 3072-512-512-10", lambda: perceptron(3072, 512, 512, CLASSES), (3072,), 128),
    "lenet": Rows("LeNet", TASKS["lenet"].model, (3, 32, 32), 128),
    "resnet18": Rows("ResNet18, BN", TASKS["resnet18"].model, (3, 32, 32), 8, 16),
}


def contenders(
    case: Rows, device: torch.device, dtype: torch.dtype, backend: str
) -> dict[str, Callable[[], Any]]:
    """Return a plain pass, and every way to the mean gradient of rows at their own points."""
    torch.manual_seed(0)
    model = case.build().to(device, dtype)
    count = case.rows * case.samples
    batch = (
        torch.randn(count, *case.shape).to(device, dtype),
        torch.randint(CLASSES, (count,)).to(device),
    )
    params, buffers = gf.extract(model)
    update = gf.chain(gf.sam_perturb(RHO, per_microbatch=True), gf.mean_rows())
    state = update.init(params)
    loss = gf.model_loss(model, criterion)

    plans: tuple[gf.Plan, ...] = ("auto", "loop")
    grads_of = {plan: gf.microbatch_grads(loss, case.rows, plan=plan) for plan in plans}

    def rows_by(plan: gf.Plan) -> gf.GradStack:
        return grads_of[plan](params, batch, buffers=buffers)

    def plain() -> None:
        torch.autograd.grad(criterion(model(batch[0]), batch[1]), [*model.parameters()])

    def by_rule(plan: gf.Plan) -> Callable[[], dict[str, Tensor]]:
        return lambda: update.update(rows_by(plan), state, params)[0]

    def by_sets() -> dict[str, Tensor]:
        rows = rows_by("auto")
        steps = RHO / (rows.sq_norms().sqrt() + 1e-12)
        near = {
            name: params[name] + steps.to(leaf.dtype).view(-1, *[1] * (leaf.ndim - 1)) * leaf
            for name, leaf in rows.stacked().items()
        }
        return rows.at_rows(near).combine(steps.new_full((case.rows,), 1 / case.rows))

    step = gf.train_step(loss, gf.chain(*update.parts, gf.sgd(1.0)), microbatches=case.rows)
    run, start = gf.compile(step, backend=backend), step.init(model)

    def compiled() -> dict[str, Tensor]:
        after = run(start, batch)[0]["params"]
        return {name: params[name] - leaf for name, leaf in after.items()}

    return {
        "plain": plain,
        PRODUCTS: by_rule("auto"),
        COMPILED: compiled,
        "M sets of parameters": by_sets,
        "loop": by_rule("loop"),
    }


def check(case: Rows, device: torch.device, backend: str) -> None:
    """Refuse to measure ways that do not agree in float64."""
    ways = contenders(case, device, torch.float64, backend)
    del ways["plain"]
    found = {name: way() for name, way in ways.items()}
    want = found.pop("loop")
    for way, tree in found.items():
        compare(f"{case.title}, {way}", tree, want, TOLERANCE)


def compare(way: str, tree: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Refuse gradients that are not those wanted.

    Raises:
        AssertionError: A leaf is further off than the tolerance, relative to its norm.
    """
    for name, leaf in tree.items():
        error = (leaf - want[name]).norm() / max(float(want[name].norm()), 1e-8)
        if not error < tolerance:
            raise AssertionError(f"{way}: {name} is off by {error:.1e}")


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__ or "", CASES, rounds=10)
    command.add_argument("--backend", choices=["inductor", "graph"], default="inductor")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    workloads: list[Contest] = []
    for name in track(options.models, "Measuring", console=Console(stderr=True)):
        case = CASES[name]
        entrants = contenders(case, device, torch.float32, options.backend)
        if device.type == "cpu":
            check(case, device, options.backend)
        else:  # it may lack float64
            single = entrants[COMPILED](), entrants[PRODUCTS]()
            compare(f"{case.title}, compiled", *single, SINGLE_TOLERANCE)
        results, _ = race(entrants, rounds_of(options), device, base="plain")
        workloads.append(
            Workload(
                model=name,
                title=case.title,
                parameters=sum(p.numel() for p in case.build().parameters()),
                results=results,
                microbatches=case.rows,
                samples_per_microbatch=case.samples,
            )
        )
    head = facts(NAME, options) | {"backend": options.backend}
    save(options.out / f"{NAME}-{device.type}.json", head, workloads)
    by_contender(workloads, caption(head))


if __name__ == "__main__":
    main()
