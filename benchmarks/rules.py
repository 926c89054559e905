"""Measure the time that each operation override of the fused plan saves.

An override runs one kernel for all rows. Without it, vmap would split the operation into several,
or could not run it. The measured time includes rows, Gram, agreement filter and weighted sum,
without one override. The base is the same with all overrides.

    python benchmarks/rules.py
    python benchmarks/rules.py --rules linear conv
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import race
from benchmarks._report import table
from benchmarks._results import Contest, save
from benchmarks._rule_models import CASES, RuleCase
from benchmarks._setting import THRESHOLD
from benchmarks._timing import Contender
from gradfilter.grads.fused.overrides._registry import OVERRIDES

NAME = Path(__file__).stem
BASE, WITHOUT = "all rules", "without"
SAMPLES, MICROBATCHES = 128, 8


def called(function: Callable[..., object]) -> str:
    """Return the name of a function without the overload that names in ``torch.ops`` have."""
    return function.__name__.partition(".")[0]


def without(case: RuleCase, run: Contender) -> Contender:
    """Return the same computation without the override of a case."""
    own = {
        function: rule for function, rule in OVERRIDES.items() if called(function) in case.functions
    }

    def compute() -> object:
        for function in own:
            del OVERRIDES[function]
        try:
            return run()
        finally:
            OVERRIDES.update(own)

    return compute


def measure(case: RuleCase, samples: int, rounds: int, device: torch.device) -> Contest:
    torch.manual_seed(0)
    model = case.model().to(device).train()
    batch = tuple(t.to(device) for t in case.batch(samples))
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, case.criterion)
    grads_of = gf.microbatch_grads(loss, MICROBATCHES, plan="fused")
    if grads_of(params, batch, buffers=buffers).overrides[case.rule] < 1:
        raise RuntimeError(f"Expected a model that uses the override {case.rule!r}, found none.")
    filter_ = gf.agree_filter(THRESHOLD)
    state = filter_.init(params)

    def filtered() -> object:
        return filter_.update(grads_of(params, batch, buffers=buffers), state, params)

    entrants = {BASE: filtered, WITHOUT: without(case, filtered)}
    results, _ = race(entrants, rounds, device, base=BASE)
    size = sum(p.numel() for p in params.values())
    return Contest(model=case.rule, title=case.rule, parameters=size, results=results)


def main(arguments: list[str] | None = None) -> None:
    cases = {case.rule: case for case in CASES}
    options = parser(__doc__, cases, called="rules").parse_args(arguments)
    warnings.filterwarnings(
        "ignore", message="There is a performance drop"
    )  # the benchmark shows this drop
    device = torch.device(options.device)
    samples = 2 * MICROBATCHES if options.quick else SAMPLES
    contests = [
        measure(cases[rule], samples, rounds_of(options), device)
        for rule in track(options.rules, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    table(contests, (WITHOUT,), caption(head), base=BASE, title="Over the same with all overrides")


if __name__ == "__main__":
    main()
