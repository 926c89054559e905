"""Time the routes to the weight gradients of convolutions, on every layer of a model."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks._conv_routes import ROUTES, Layer, layers_of
from benchmarks._models import Task
from benchmarks._race import race
from benchmarks._results import Result


def convolutions(
    title: str,
    task: Task,
    microbatches: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time all routes on every different convolution of a model, and find the fastest of each."""
    ((_, samples),) = task.workloads
    with torch.device("meta"):  # shapes only
        layers = layers_of(task.model(), task.batch(microbatches * samples)[0])
    found = []
    grid = Table(title=f"Weight gradients of {microbatches} microbatches, {title}")
    for column in ("layer", *ROUTES, "fastest"):
        grid.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        results, differences = _compare(layer, microbatches, dtype, rounds, device)
        times = {name: r.seconds.median for name, r in results.items() if r.seconds}
        fastest = min(times, key=times.__getitem__) if times else "none"
        cells = [f"{times[name] * 1e3:.2f} ms" if name in times else "-" for name in ROUTES]
        grid.add_row(layer.title, *cells, fastest)
        record = {name: asdict(result) for name, result in results.items()}
        found.append(
            {**asdict(layer), "fastest": fastest, "routes": record, "differences": differences}
        )
    Console().print(grid)
    return found


def _compare(
    layer: Layer, microbatches: int, dtype: torch.dtype, rounds: int, device: torch.device
) -> tuple[dict[str, Result], dict[str, float]]:
    """Time all routes; return the results, and the relative difference of each from the loop."""
    make = partial(torch.randn, dtype=dtype, device=device)
    x, weight = make(layer.inputs), make(layer.weight)
    d = torch.randn_like(F.conv2d(x, weight, None, layer.stride, layer.padding))
    entrants = {name: partial(r, layer, x, d, weight, microbatches) for name, r in ROUTES.items()}
    results, _ = race(entrants, rounds, device, base="loop")
    right = entrants["loop"]().double()
    differences = {
        name: ((entrants[name]().double() - right).norm() / right.norm()).item()
        for name, result in results.items()
        if result.failure is None
    }
    return results, differences
