"""Measure a step over parameters that FSDP2 shards, next to an ordinary step of FSDP2.

    python -m benchmarks._sharded --out benchmarks/results

Counts the bytes that a rank sends and the memory that a step takes in addition to what was there
before it, on two processes of one machine. Times of processes that share a CPU say little.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradfilter as gf
from benchmarks._machine import machine
from benchmarks._wire import Wire
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

M = 4

Sizes = tuple[int, int, int, int]
"""The width, the length of a sequence, the number of words, the number of layers."""


class Language(nn.Module):
    """A language model: blocks that are sharded one by one, and a root with table and head."""

    def __init__(self, width: int, length: int, words: int, layers: int) -> None:
        """Take the sizes."""
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.place = nn.Parameter(torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of all positions."""
        h = self.table(x) + self.place
        for block in self.blocks:
            h = block(h)
        scores: Tensor = self.head(self.norm(h))
        return scores


def criterion(output: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


CHAINS: dict[str, Callable[[], list[gf.Transform]]] = {
    "mean": lambda: [gf.mean_rows()],
    "norms": lambda: [gf.clip_per_row(1.0), gf.mean_rows()],
    "consensus": lambda: [gf.consensus_filter()],
    "gram": lambda: [gf.agree_filter(1.5)],
}


def model_of(sizes: Sizes) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a sharded model and an optimizer of torch."""
    torch.manual_seed(0)
    model, mesh = Language(*sizes), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def steps(sizes: Sizes, samples: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield an ordinary step of FSDP2, and one of each chain, each with a model of its own."""
    x, y = (torch.randint(sizes[2], (M * samples, sizes[1])) for _ in range(2))
    model, optimizer = model_of(sizes)

    def ordinary() -> None:
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    yield "ordinary", ordinary
    for name, chain in CHAINS.items():
        own, rule = model_of(sizes)
        filtered = Filtered(own, criterion, gf.chain(across_ranks(), *chain()), rule, M)

        def step(filtered: Filtered = filtered, rule: torch.optim.Optimizer = rule) -> None:
            filtered.step(x, y)
            rule.zero_grad()

        yield name, step


def resident(step: Callable[[], None]) -> int:
    """Return the most memory that a step takes in addition to what was there before, in bytes.

    The profiler misses what threads of the process group free, so the kernel is asked.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measured(sizes: Sizes, samples: int, rounds: int) -> dict[str, Any]:
    """Return bytes, memory and seconds of every step on this rank."""
    made = dict(steps(sizes, samples))
    found: dict[str, dict[str, float]] = {}
    for name, step in made.items():
        step()  # which also compares the ranks
        with Wire(dist.get_world_size()) as wire:
            step()
        found[name] = {"bytes_sent": wire.sent, "peak_bytes": resident(step)}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):  # interleaved
        for name, step in made.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        found[name]["seconds"] = statistics.median(times)
    return found


def _rank(rank: int, size: int, folder: str, sizes: Sizes, samples: int, rounds: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = measured(sizes, samples, rounds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write ``sharded-cpu.json``."""
    parser = argparse.ArgumentParser(description="A step over sharded parameters next to FSDP2's.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args(argv)
    # Large tensors then go back to the kernel when they are freed, in the processes that follow.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    sizes, samples = ((64, 8, 50, 1), 1) if args.quick else ((768, 128, 4000, 4), 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, (args.ranks, folder, sizes, samples, args.rounds), nprocs=args.ranks
        )
        found = json.loads(Path(folder, "found.json").read_text())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Language(*sizes).parameters())
    base = found["ordinary"]
    for name, row in found.items():
        ratios = "  ".join(f"{key} {row[key] / base[key]:.2f}x" for key in row)
        print(f"{name:10} {ratios}")
    if args.out:
        result = {
            "machine": machine(torch.device("cpu")),
            "ranks": args.ranks,
            "microbatches": M,
            "samples": samples,
            "sizes": dict(zip(("width", "length", "words", "layers"), sizes, strict=True)),
            "parameters": parameters,
            "steps": found,
            "ratios": {
                name: {key: row[key] / base[key] for key in row}
                for name, row in found.items()
                if name != "ordinary"
            },
        }
        (args.out / "sharded-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
