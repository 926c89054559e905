"""Everything that has to be known of a GPU, in one command of a few minutes.

Plans on four kinds of model in float32 and bfloat16, a captured step, whether a step waits for the
device, ways to a convolution's weight gradients, and memory. A case that fails is recorded with its
reason, and the JSON is written after every case.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --cases resnet18 conv
    python benchmarks/gpu.py --device cpu --quick      (tries the code out, measures nothing)
"""

import gc
import os
import sys
import time
import warnings
from pathlib import Path

# The profiler, which counts the memory, otherwise reports its every start; read by torch's import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console

if not __package__:  # run as a file: make the folder around it the package it is
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
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap, see its time
    console = Console()
    head = facts(NAME, choice)
    target = choice.out / f"{NAME}-{choice.device}.json"
    cases = earlier(target, head).get("cases", {})
    for name in choice.cases:
        start = time.perf_counter()
        try:
            cases[name] = CASES[name](options)
        except Exception as error:  # whatever it is, the other cases go on
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
