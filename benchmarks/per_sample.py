"""Measure the time of per-sample gradients, their norms and their consensus, for all libraries.

Each of N samples is one row. There are three questions: the squared norms of all rows, the gradient
that the consensus filter computes (norms, cosines, weighted sum), and the rows themselves. Before
the measurement, all answers are compared with a float64 loop.

    python benchmarks/per_sample.py
"""

import copy
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from benchmarks._consensus import consensus, sq_norms
from benchmarks._models import TASKS, Batch, Task, criterion
from benchmarks._per_sample_peers import DIRECT, STACKS
from benchmarks._race import deferred, race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._setting import Setting
from benchmarks._tf32 import tf32_off
from benchmarks._timing import Contender
from gradfilter.grads._loss import ModelLoss
from gradfilter.grads._microbatch import Plan

NAME = Path(__file__).stem
MODELS = ("mlp", "lenet")
SAMPLES, FEW = 128, 8  # the second with --quick
TOLERANCE = 1e-4  # relative, for a whole answer

Tree = dict[str, Tensor]
Answer = Tensor | Tree

QUESTIONS: dict[str, Callable[[Tree], Answer]] = {
    "norms": sq_norms,
    "consensus": consensus,
    "rows": lambda grads: grads,
}


def label(library: str, question: str) -> str:
    return f"{library}: {question}"


def ours(
    params: Tree, loss: ModelLoss, batch: Batch, plan: Plan
) -> dict[str, Callable[[], Answer]]:
    """Return the function of gradfilter for each question."""
    grads_of, filter_ = gf.per_sample_grads(loss, plan=plan), gf.consensus_filter()
    state = filter_.init(params)
    return {
        "norms": lambda: grads_of(params, batch).sq_norms(),
        "consensus": lambda: filter_.update(grads_of(params, batch), state, params)[0],
        "rows": lambda: grads_of(params, batch).stacked(),
    }


def contenders(setting: Setting) -> dict[str, Contender]:
    """Return the plain pass, and for each question all libraries that can answer it."""
    model, batch = setting.model, setting.batch
    entrants: dict[str, Contender] = {"plain": setting.plain}
    for question, run in ours(setting.params, setting.loss, batch, "fused").items():
        entrants[label("gradfilter", question)] = run
    for library, stack in STACKS.items():
        for question, ask in QUESTIONS.items():
            build = partial(asked, ask, stack, model, batch)
            entrants[label(library, question)] = deferred(build)
    for question, libraries in DIRECT.items():
        for library, build in libraries.items():
            entrants[label(library, question)] = deferred(partial(build, model, batch))
    return entrants


def asked(
    question: Callable[[Tree], Answer],
    stack: Callable[[nn.Module, Batch], Callable[[], Tree]],
    model: nn.Module,
    batch: Batch,
) -> Contender:
    """Return a function that computes the rows and then answers a question."""
    grads = stack(model, batch)
    return lambda: question(grads())


def check(entrants: dict[str, Contender], setting: Setting) -> None:
    """Check that all answers agree with a float64 loop.

    Raises:
        ValueError: An answer is wrong. If a contender gives no answer, the race reports it.
    """
    model = copy.deepcopy(setting.model).double()
    inputs, targets = setting.batch
    right = ours(
        gf.extract(model)[0], gf.model_loss(model, criterion), (inputs.double(), targets), "loop"
    )
    for question, answer in right.items():
        expected = answer()
        for name in (name for name in entrants if name.endswith(label("", question))):
            try:
                given = entrants[name]()
            except Exception:
                continue
            difference = _difference(given, expected)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"Expected the answer of a float64 loop, found a relative difference of "
                    f"{difference:.1e} for {name}."
                )


def _difference(given: Answer, expected: Answer) -> float:
    """Return the relative difference in norm."""
    if isinstance(given, Tensor):
        given, expected = {"": given}, {"": expected}
    off = sum((given[name] - e).double().square().sum() for name, e in expected.items())
    return (off / sum(e.square().sum() for e in expected.values())).sqrt().item()


def measure(name: str, task: Task, samples: int, rounds: int, device: torch.device) -> Contest:
    setting = Setting.of(task, samples, device)
    entrants = contenders(setting)
    with tf32_off():  # otherwise a GPU multiplies with ten bits, and the check would fail
        check(entrants, setting)
    results, _ = race(entrants, rounds, device, base="plain")
    return Contest(
        model=name,
        title=f"{task.title}, N = {samples}",
        parameters=setting.size,
        results=results,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, MODELS).parse_args(arguments)
    device = torch.device(options.device)
    # Opacus has hooks on the first layer, whose input needs no gradient. This is correct.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    samples = FEW if options.quick else SAMPLES
    contests = [
        measure(name, TASKS[name], samples, rounds_of(options), device)
        for name in track(options.models, "Measuring", console=Console(stderr=True))
    ]
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, contests)
    by_contender(contests, caption(head))


if __name__ == "__main__":
    main()
