"""Measure how the time grows with the number of microbatches, for the same samples.

N samples are divided into M microbatches, for several M. The measured time includes the rows, their
Gram, the agreement filter and the weighted sum of all rows. The base is the same with M = 2.

    python benchmarks/growth.py
"""

import os
import sys
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._models import TASKS
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._setting import Setting

NAME = Path(__file__).stem
BASE = "M = 2"
# The last maps of ResNet18 are 1 x 1, so BatchNorm needs more than one sample there.
COUNTS = {"mlp": (2, 8, 32, 128), "resnet18": (2, 8, 32)}
SAMPLES = 128


def measure(
    name: str, counts: tuple[int, ...], samples: int, rounds: int, device: torch.device
) -> Contest:
    setting = Setting.of(TASKS[name], samples, device)
    entrants = {f"M = {count}": setting.filtered(count, "fused") for count in counts}
    results, _ = race({"plain": setting.plain, **entrants}, rounds, device, base=BASE)
    return Contest(
        model=name,
        title=f"{TASKS[name].title}, N = {samples}",
        parameters=setting.size,
        results=results,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, COUNTS).parse_args(arguments)
    device = torch.device(options.device)
    contests = [
        measure(
            name,
            COUNTS[name][: 2 if options.quick else None],
            SAMPLES // 4 if options.quick else SAMPLES,
            rounds_of(options),
            device,
        )
        for name in track(options.models, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    by_contender(contests, caption(head), base=BASE, title=f"Over {BASE}, for the same samples")


if __name__ == "__main__":
    main()
