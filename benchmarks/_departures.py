"""Measure whether it pays to send leaves to other ranks during the backward pass, on CPUs.

    python -m benchmarks._departures --out benchmarks/results

Two processes of one machine train one model, with everything sent after the pass (as on CPUs), and
with each bucket sent as soon as it is complete (as on accelerators), in turn. The base of a ratio
is the same chain with everything sent after the pass.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import gradfilter as gf
from benchmarks._machine import machine
from benchmarks._timing import Contender
from benchmarks.distributed import CASES, CPU, ROWS, TRANSFORMS, timed
from gradfilter.distributed import RankStack, across_ranks

MODELS = ["mlp-2M", "mlp-11M"]
RANKS = 2
WAYS = {"after": False, "during": True}


def sending(early: bool) -> gf.Transform:
    """Return a transform that decides when the leaves of a `RankStack` are sent."""

    def update(rows: Any, state: Any, params: gf.Params, /, **extra: Any) -> tuple[Any, Any, Any]:
        assert isinstance(rows, RankStack)
        rows._gathered.leaves_early = early
        return rows, state, {}

    return gf.transform("sending", "rows -> rows", update)


def step_of(name: str, m: int, early: bool, model: nn.Module, batch: Any) -> Contender:
    """Return a training step."""
    chain = gf.chain(across_ranks(), sending(early), TRANSFORMS[name](), gf.sgd(1e-3, momentum=0.9))
    step = gf.train_step(gf.model_loss(model, nn.functional.cross_entropy), chain, microbatches=m)
    now = [step.init(model)]

    def run() -> None:
        now[0], _ = step(now[0], batch, donate=True)

    return run


def _rank(rank: int, folder: str, rounds: int, quick: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found: dict[str, dict[str, Any]] = {}
    for title in ["mlp-0.1M"] if quick else MODELS:
        case = CASES[title]
        torch.manual_seed(0)
        model, samples = case.model(), case.samples
        torch.manual_seed(1 + rank)
        batch = torch.randn(samples, *case.shape), torch.randint(10, (samples,))
        cells = {f"{name}, M = {m}": (name, m) for m in ROWS for name in TRANSFORMS}
        steps = {
            f"{cell}, {way}": step_of(*chain, early, model, batch)
            for cell, chain in cells.items()
            for way, early in WAYS.items()
        }
        times = timed(steps, rounds, CPU)
        found[title] = {
            cell: {
                "seconds_after": times.seconds_of(f"{cell}, after").median,
                "seconds_during": times.seconds_of(f"{cell}, during").median,
                "ratio": times.ratio_to(f"{cell}, after", f"{cell}, during").median,
            }
            for cell in cells
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write ``departures-cpu.json``."""
    parser = argparse.ArgumentParser(description="Sending leaves during or after the pass.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, args.rounds, args.quick), nprocs=RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    for title, chains in found.items():
        for name, row in chains.items():
            print(f"{title:10} {name:20} during / after: {row['ratio']:.2f}")
    if args.out:
        facts = {"machine": machine(CPU), "ranks": RANKS, "rounds": args.rounds}
        result = facts | {"steps": found}
        (args.out / "departures-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
