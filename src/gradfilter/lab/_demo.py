"""``gradfilter demo``: three trainings on digits with wrong labels, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gradfilter as gf
from gradfilter.lab._crew import Crew, connected, own_device
from gradfilter.lab._demo_config import (
    DemoConfig,
    checked,
    directory,
    evaluate_every,
    settings,
)
from gradfilter.lab._digits import CLASSES, Digits, noisy_digits, stream
from gradfilter.lab._evaluation import Evaluation, evaluate
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._plot import curves
from gradfilter.lab._rundir import append_json_line, write_bytes, write_checkpoint, write_json
from gradfilter.lab._sampling import class_balanced
from gradfilter.lab._table import comparison
from gradfilter.lab._training import (
    MICROBATCHES,
    Method,
    Training,
    advance,
    begin,
)


def demo(config: DemoConfig) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        UsageError: A value is out of range. Nothing has been done then.
    """
    device = own_device(checked(config))
    with connected(device) as crew, interruptible() as stopped:
        train = partial(_train_all, config, device, crew, crew.together(stopped))
        if crew.is_first:
            return _recorded(config, train)
        # The others compute; what there is to say is said once.
        finished = _finished_seeds(config, train(None))
        return 0 if len(finished) == config.seeds else 130


def _recorded(config: DemoConfig, train: Callable[[Path], list[Evaluation]]) -> int:
    """Train, and write and print what came of it."""
    folder = directory(config)
    record, status = settings(config), "interrupted"
    write_json(folder / "config.json", {**record, "status": "running"})
    print(f"writing to {folder}", flush=True)
    try:
        if _report(config, folder, train(folder)):
            status = "finished"
    finally:
        write_json(folder / "config.json", {**record, "status": status})
    return 0 if status == "finished" else 130


def _methods(config: DemoConfig) -> list[Method]:
    return [
        Method("sgd", "plain SGD", gf.mean_rows(), 1),
        Method(
            "agree",
            f"agreement of {MICROBATCHES} microbatches",
            gf.agree_filter(config.threshold),
            MICROBATCHES,
        ),
        Method("consensus", "consensus of per-sample gradients", gf.consensus_filter(), None),
    ]


def _train_all(
    config: DemoConfig,
    device: torch.device,
    crew: Crew,
    stopped: Callable[[], bool],
    folder: Path | None,
) -> list[Evaluation]:
    """Train every method with every seed, or as much of it as there is time for.

    Args:
        config: What to do.
        device: Where.
        crew: With whom.
        stopped: Whether to stop.
        folder: For metrics and checkpoints; None to write nothing.
    """
    methods = _methods(config)
    evaluations: list[Evaluation] = []

    def log(evaluation: Evaluation) -> None:
        evaluations.append(evaluation)
        if folder is not None:
            append_json_line(folder / "metrics.jsonl", asdict(evaluation))

    with _progress(folder is not None) as progress:
        total = config.steps * config.seeds
        bars = {m.name: progress.add_task(m.label, total=total) for m in methods}
        for seed in range(config.seed, config.seed + config.seeds):
            data = noisy_digits(config.noise, seed, device, getattr(torch, config.dtype))
            trainings = _begin(config, methods, seed, data, crew)
            for training in trainings:
                log(evaluate(training, data, crew))
            _take_turns(
                trainings,
                data,
                config.steps,
                crew,
                stopped=stopped,
                tick=lambda training: progress.advance(bars[training.method.name]),
                log=log,
            )
            if folder is not None:
                for training in trainings:
                    path = folder / f"{training.method.name}-seed-{seed}.pt"
                    write_checkpoint(path, gf.state_dict(training.state))
            if stopped():
                break
    return evaluations


def _begin(
    config: DemoConfig, methods: Sequence[Method], seed: int, data: Digits, crew: Crew
) -> list[Training]:
    batches = class_balanced(
        data.labels.cpu().numpy(),
        CLASSES,
        config.steps,
        MICROBATCHES,
        stream(seed, "batches"),
    )
    on_device = torch.from_numpy(batches).to(data.labels.device)
    return [begin(method, seed, data, on_device, crew) for method in methods]


def _take_turns(
    trainings: Sequence[Training],
    data: Digits,
    steps: int,
    crew: Crew,
    *,
    stopped: Callable[[], bool],
    tick: Callable[[Training], None],
    log: Callable[[Evaluation], None],
) -> None:
    """Take turns from one evaluation to the next, so that whenever it ends all are about as far."""
    every = evaluate_every(steps)
    for until in range(every, steps + every, every):
        for training in trainings:
            before = training.done
            advance(
                training, data, min(until, steps), stopped=stopped, tick=partial(tick, training)
            )
            if training.done > before:
                log(evaluate(training, data, crew))


def _report(config: DemoConfig, folder: Path, evaluations: Sequence[Evaluation]) -> bool:
    """Draw and print what there is; say whether that is everything."""
    methods = _methods(config)
    labels = {method.name: method.label for method in methods}
    last = {(e.run, e.seed): e.step for e in evaluations}
    finished = _finished_seeds(config, evaluations)
    # Half-trained seeds would make means of unlike things; alone they are better than nothing.
    shown = [e for e in evaluations if e.seed in finished] if finished else evaluations
    title = _title(config, len(finished), sorted(last.values()))
    write_bytes(folder / "curves.png", curves(shown, labels, title))
    print(title)
    # A file or pipe has no width of its own, and 80 columns would break the lines.
    Console(width=None if sys.stdout.isatty() else 120).print(comparison(shown, labels))
    checkpoints = len(list(folder.glob("*.pt")))
    print(
        f"wrote {folder}/: metrics.jsonl, config.json, curves.png and {checkpoints} checkpoints, "
        "RUN-seed-SEED.pt"
    )
    return len(finished) == config.seeds


def _finished_seeds(config: DemoConfig, evaluations: Sequence[Evaluation]) -> set[int]:
    """The seeds with which every method was trained to the end."""
    last = {(e.run, e.seed): e.step for e in evaluations}
    names = [method.name for method in _methods(config)]
    return {seed for _, seed in last if all(last[n, seed] == config.steps for n in names)}


def _title(config: DemoConfig, finished: int, steps: Sequence[int]) -> str:
    noise = f"digits, {100 * config.noise:g} % of the training labels wrong"
    if finished == config.seeds:
        seeds = f"mean ± sd of {config.seeds} seeds" if finished > 1 else f"seed {config.seed}"
        return f"{noise}, {config.steps} steps, {seeds}"
    if finished:
        return f"{noise}, interrupted: {finished} of {config.seeds} seeds finished"
    span = f"{steps[0]}" if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
    return f"{noise}, seed {config.seed}, interrupted after {span} of {config.steps} steps"


def _progress(shown: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),  # a log file wants no bars
    )
