"""Measure training steps with rows of several ranks; the base is DistributedDataParallel.

W processes on this machine train one model with SGD; each has its own samples. DDP averages the
gradients of all ranks. The other contenders join M rows per rank in one stack, and take their mean
or filter them by agreement or consensus. Two numbers of bytes are recorded per rank and step: one
is counted from the sizes of all collectives, and the other is the traffic of the loopback interface
divided by the number of ranks.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --models mlp-2M --worlds 2
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import Batch
from benchmarks._results import Contest, Result, save
from benchmarks._timing import Contender, Timings, clock_for, interleave
from benchmarks._wire import Wire, loopback_bytes
from gradfilter.distributed import across_ranks

if TYPE_CHECKING:
    from multiprocessing import Queue

NAME = Path(__file__).stem
CPU = torch.device("cpu")
BASE = "DDP"
LR, MOMENTUM, CLASSES = 1e-3, 0.9, 10
STEPS = 4  # in a row, as in training: ranks need not finish a step at the same time


def mlp(width: int) -> nn.Module:
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Case:
    """A model, and the samples of one rank in one step."""

    title: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int


CASES = {
    "mlp-0.1M": Case("MLP, 0.1 M parameters", lambda: mlp(128), (784,), 128),
    "mlp-2M": Case("MLP, 1.9 M parameters", lambda: mlp(1024), (784,), 128),
    "mlp-11M": Case("MLP, 11 M parameters", lambda: mlp(3000), (784,), 128),
    "resnet18": Case(
        "ResNet18, 11 M parameters",
        lambda: torchvision.models.resnet18(num_classes=CLASSES),
        (3, 64, 64),
        16,
    ),
}
TRANSFORMS = {
    "mean": gf.mean_rows,
    "agreement": lambda: gf.agree_filter(2.0),  # rejects nothing, so all rows are combined
    "consensus": lambda: gf.consensus_filter(2.0),
}
ROWS = (1, 4)  # M


@dataclass(frozen=True, kw_only=True)
class OnRanks(Contest):
    """The results of one model on W ranks, with the bytes that one rank sends in one step."""

    ranks: int
    samples_per_rank: int
    counted_bytes: dict[str, float]
    loopback_bytes: dict[str, float | None] = field(default_factory=dict)


def of_torch(model: nn.Module, batch: Batch) -> Contender:
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def ours(
    transform: gf.Transform, m: int, model: nn.Module, batch: tuple[torch.Tensor, ...]
) -> Contender:
    update = gf.chain(across_ranks(), transform, gf.sgd(LR, momentum=MOMENTUM))
    grads_of = gf.microbatch_grads(gf.model_loss(model, nn.functional.cross_entropy), m)
    params, buffers = gf.extract(model)
    now: list[Any] = [params, update.init(params), buffers]

    def step() -> None:
        rows = grads_of(now[0], batch, buffers=now[2])
        params, state, _ = update(now[0], now[1], rows, donate=True)
        now[:] = params, state, rows.buffers

    return step


def entrants(case: Case, device: torch.device, samples: int) -> dict[str, Contender]:
    torch.manual_seed(0)
    model = case.model().to(device).train()
    g = torch.Generator().manual_seed(dist.get_rank())
    batch = (
        torch.randn(samples, *case.shape, generator=g).to(device),
        torch.randint(CLASSES, (samples,), generator=g).to(device),
    )
    steps = {
        f"{name}, M = {m}": ours(make(), m, model, batch)
        for m in ROWS
        for name, make in TRANSFORMS.items()
    }
    # DDP is the last, because it then owns the model. The others have copies of its parameters.
    return {BASE: of_torch(model, batch), **steps}


def timed(steps: dict[str, Contender], rounds: int, device: torch.device) -> Timings:
    """Time all steps; return the seconds per step of the slowest rank in every round."""

    seconds_of = clock_for(device)

    def clock(step: Contender) -> float:
        dist.barrier()
        seconds = seconds_of(lambda: [step() for _ in range(STEPS)]) / STEPS
        slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    return interleave(steps, rounds, clock, warmup=2)


def counted(step: Contender) -> float:
    """Count the bytes that this rank sends in one step."""
    with Wire(dist.get_world_size()) as wire:
        step()
    return wire.sent


def carried(step: Contender) -> float | None:
    """Return the bytes on the loopback interface in one step, divided by the number of ranks."""
    dist.barrier()
    before = loopback_bytes()
    for _ in range(STEPS):
        step()
    dist.barrier()
    after = loopback_bytes()
    if before is None or after is None:
        return None
    return (after - before) / STEPS / dist.get_world_size()


def on_rank(rank: int, size: int, store: str, options: dict[str, Any], out: "Queue[Any]") -> None:
    """Run all cases in one process; the first rank puts the results into the queue."""
    device = torch.device(options["device"], rank) if options["device"] == "cuda" else CPU
    if device == CPU:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    else:
        torch.cuda.set_device(device)
    backend = "gloo" if device == CPU else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    for name in options["models"]:
        case = CASES[name]
        samples = options["samples"] or case.samples
        steps = entrants(case, device, samples)
        timings = timed(steps, options["rounds"], device)
        # DDP sends without the dispatcher, so its bytes come from a formula instead of a count.
        size_of = sum(p.numel() * p.element_size() for p in case.model().parameters())
        sent = {BASE: 2 * size_of * (size - 1) / size}
        sent |= {name: counted(step) for name, step in steps.items() if name != BASE}
        lo = {name: carried(step) for name, step in steps.items()}
        results = {
            name: Result(timings.seconds_of(name), timings.ratio_to(BASE, name))
            for name in timings.seconds
        } | {name: Result(failure=why) for name, why in timings.failures.items()}
        if rank == 0:
            out.put(
                OnRanks(
                    model=f"{name}-ranks-{size}",
                    title=f"{case.title}, W = {size}, {samples} samples per rank",
                    parameters=size_of // 4,
                    results=results,
                    ranks=size,
                    samples_per_rank=samples,
                    counted_bytes=sent,
                    loopback_bytes=lo,
                )
            )
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, options: dict[str, Any]) -> list[OnRanks]:
    """Run all cases on a number of ranks."""
    if options["device"] == "cuda" and torch.cuda.device_count() < size:
        print(f"Skipped W = {size}: expected {size} GPUs, found {torch.cuda.device_count()}")
        return []
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = torch.multiprocessing.spawn(
            on_rank, (size, store, options, out), nprocs=size, join=False
        )
        found = [out.get() for _ in options["models"]]
        while not ranks.join():
            pass
    return found


def show(contests: list[OnRanks], about: str) -> None:
    grid = Table(title="A step on W ranks, over a step of DDP", caption=about)
    for name in ("", "time over DDP", "milliseconds", "counted bytes over DDP", "on loopback"):
        grid.add_column(name, justify="right" if name else "left")
    for contest in contests:
        grid.add_section()
        grid.add_row(f"[bold]{contest.title}[/bold]")
        base = contest.counted_bytes[BASE]
        for name, result in contest.results.items():
            if result.seconds is None or result.ratio is None:
                grid.add_row(name, f"[red]{result.failure}[/red]")
                continue
            ratio, real = result.ratio, contest.loopback_bytes[name]
            grid.add_row(
                name,
                f"[bold]{ratio.median:.2f}x[/bold] "
                f"({ratio.lower_quartile:.2f}, {ratio.upper_quartile:.2f})",
                f"{result.seconds.median * 1e3:.1f}",
                f"{contest.counted_bytes[name] / base:.3f}",
                "unknown" if real is None else f"{real / base:.3f}",
            )
    Console(width=120).print(grid)


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, CASES)
    command.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    options = command.parse_args(arguments)
    chosen = {
        "device": options.device,
        "models": options.models,
        "rounds": rounds_of(options),
        "samples": 4 if options.quick else None,
    }
    head = facts(NAME, options)
    contests: list[OnRanks] = []
    for size in track(options.worlds, "Measuring", console=Console(stderr=True)):
        contests += measure(size, chosen)
    save(options.out / f"{NAME}-{options.device}.json", head, [*contests])
    show(contests, caption(head))


if __name__ == "__main__":
    main()
