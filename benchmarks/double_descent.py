"""Find the peak of double descent, in the error and in the empirical Lipschitz constant.

There are two studies on digits with 20 % wrong training labels, with five seeds each.

features: ridgeless regression on p random ReLU features of n = 200 images. In theory the peak is
exactly at p = n, and the Jacobian has a closed form. So this study also tests the measurement.

widths: networks with two hidden layers of h units, trained with the preset double-descent-digits
(with --quick for fewer epochs). The Lipschitz constant is √(mean σ²) over the training images,
where σ is the largest singular value of the Jacobian of the logits. The threshold is the first
width that predicts all training labels, right or wrong.

    python benchmarks/double_descent.py --part features
    python benchmarks/double_descent.py --part widths
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._machine import machine
from benchmarks._random_features import measure
from benchmarks._results import write
from gradfilter import diagnostics
from gradfilter.lab.train._accuracies import accuracies
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._training import advance

SAMPLES, NOISE, SEEDS = 200, 0.2, (0, 1, 2, 3, 4)
FEATURES = (20, 50, 100, 150, 180, 190, 195, 200, 205, 210, 220, 250, 300, 400, 800, 1600)
WIDTHS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 128, 256)
PRESET = "double-descent-digits"


def feature_line(features: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"seed": seed, **asdict(measure(features, SAMPLES, NOISE, seed))}


def width_line(width: int, seed: int, epochs: float) -> dict[str, Any]:
    """Train one network and measure it."""
    torch.set_num_threads(1)
    config = replace(
        parse_train(["--preset", PRESET]).settings,
        model=f"mlp_{width}",
        epochs=epochs,
        **{"seed": seed, "data_split_seed": seed, "label_seed": seed},
    )
    run = build_training(config, torch.device("cpu"))
    advance(run, run.total_steps)
    found = accuracies(run.model, run.state, run.data)
    model, samples = run.model.eval(), run.data.train

    def logits(images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, run.state["params"], (images,))
        return out

    x = samples.images.fetch(torch.arange(len(samples)))
    norms = diagnostics.operator_norm(logits, x).values
    return {
        "width": width,
        "seed": seed,
        "steps": run.done,
        "parameters": sum(p.numel() for p in run.state["params"].values()),
        "train_error": 1 - found["train_accuracy"],
        "test_error": 1 - found["test_accuracy"],
        "train_loss": found["train_loss"],
        "memorised": found["memorised"],
        "lipschitz": norms.square().mean().sqrt().item(),
        "jacobian_norm": diagnostics.jacobian_norm(logits, x).mean().item(),
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("features", "widths"), required=True)
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of processes, each with one thread"
    )
    parser.add_argument(
        "--epochs", type=float, help="epochs for --part widths, instead of those of the preset"
    )
    parser.add_argument("--quick", action="store_true", help="use few points, as a test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(args)
    seeds = SEEDS[:2] if given.quick else SEEDS
    epochs = given.epochs or (
        1.0 if given.quick else parse_train(["--preset", PRESET]).settings.epochs
    )
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        if given.part == "features":
            sizes = FEATURES[::5] if given.quick else FEATURES
            futures = [pool.submit(feature_line, p, seed) for p in sizes for seed in seeds]
        else:
            sizes = WIDTHS[::7] if given.quick else WIDTHS
            # Start with the widest, so that no long training is left at the end.
            futures = [pool.submit(width_line, h, s, epochs) for h in sizes[::-1] for s in seeds]
        done = track(as_completed(futures), total=len(futures), description=given.part)
        lines = [future.result() for future in done]
    size = "features" if given.part == "features" else "width"
    lines.sort(key=lambda line: (line[size], line["seed"]))
    facts = {
        "benchmark": f"double_descent_{given.part}",
        **machine(torch.device("cpu")),
        "noise": NOISE,
        **({"samples": SAMPLES} if given.part == "features" else {"epochs": epochs}),
        "preset": None if given.part == "features" else PRESET,
    }
    means = [_means(lines, size, value) for value in sizes]
    peak = {name: _peak(means, size, name) for name in ("test_error", "lipschitz")}
    fits = [point[size] for point in means if point["train_error"] == 0]
    summary = {"peaks": peak, "first_without_train_error": min(fits, default=None)}
    path = given.out / f"double_descent_{given.part}-cpu.json"
    write(path, {**facts, **summary, "means": means, "lines": lines})
    Console(width=120).print(_table(means, size))
    print(json.dumps(summary))


def _peak(means: list[dict[str, Any]], size: str, name: str) -> int | None:
    """Return the size at the peak: the highest point after the first valley."""
    values = [point[name] for point in means]
    down = next((i for i in range(1, len(values)) if values[i] > values[i - 1]), None)
    if down is None:
        return None
    top = max(range(down, len(values)), key=lambda i: values[i])
    return int(means[top][size])


def _means(lines: list[dict[str, Any]], size: str, value: int) -> dict[str, Any]:
    own = [line for line in lines if line[size] == value]
    names = [name for name in own[0] if name not in (size, "seed")]
    return {size: value, **{n: statistics.mean(line[n] for line in own) for n in names}}


def _table(means: list[dict[str, Any]], size: str) -> Table:
    table = Table(title="means of all seeds")
    for name in means[0]:
        table.add_column(name, justify="right")
    for point in means:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in point.values()))
    return table


if __name__ == "__main__":
    main()
