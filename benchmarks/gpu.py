"""Run all measurements that need a GPU, in a few minutes.

The cases are plans on four kinds of model in float32 and bfloat16, a captured step, a check whether
a step waits for the device, the routes to the weight gradients of convolutions, and memory. If a
case fails, its reason is recorded. The JSON is written after every case.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --cases resnet18 conv
    python benchmarks/gpu.py --device cpu --quick      (tests the code only)
"""

import gc
import os
import sys
import time
import warnings
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._command import facts, parser, rounds_of
from benchmarks._gpu_cases import CASES, Options
from benchmarks._results import earlier, write
from benchmarks._timing import reason

NAME = Path(__file__).stem


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__, CASES, called="cases", rounds=10)
    command.set_defaults(device="cuda")
    choice = command.parse_args(arguments)
    options = Options(torch.device(choice.device), rounds_of(choice), choice.quick)
    warnings.filterwarnings(
        "ignore", message="There is a performance drop"
    )  # from vmap; its time shows it
    console = Console()
    head = facts(NAME, choice)
    target = choice.out / f"{NAME}-{choice.device}.json"
    cases = earlier(target, head).get("cases", {})
    for name in choice.cases:
        start = time.perf_counter()
        try:
            cases[name] = CASES[name](options)
        except Exception as error:  # for any error, the other cases continue
            cases[name] = {"failure": reason(error)}
        cases[name]["took"] = time.perf_counter() - start
        write(target, {**head, "cases": cases})
        failure = cases[name].get("failure", "")
        console.print(f"{name}: {cases[name]['took']:.0f} s {failure}", markup=False)
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
