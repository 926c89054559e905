"""``gradfilter demo``: three trainings on digits with wrong labels, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import gradfilter as gf
from gradfilter.lab._crew import Crew, connected, own_device
from gradfilter.lab._demo_config import DemoConfig, checked, directory, evaluate_every
from gradfilter.lab._demo_methods import LABELS, METHODS, settings, train_config
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._measured import Measured, as_line
from gradfilter.lab._plot import curves
from gradfilter.lab._reading import printable
from gradfilter.lab._rundir import append_json_line, write_bytes, write_json
from gradfilter.lab._table import comparison
from gradfilter.lab.train._archive import tensor_bytes
from gradfilter.lab.train._begin import begin
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._progress import bars
from gradfilter.lab.train._run import Run, advance, evaluation, settle
from gradfilter.lab.train._totals import nothing


def demo(config: DemoConfig) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is out of range. Nothing has been done then.
    """
    device = own_device(checked(config))
    with connected(device) as crew, interruptible() as stop:
        train = partial(_train_all, config, device, crew, crew.together(stop))
        if crew.is_first:
            return 0 if _recorded(config, train) else stop.exit_code
        # The others compute; what there is to say is said once.
        finished = _finished_seeds(config, train(None))
        return 0 if len(finished) == config.seeds else stop.exit_code


def _recorded(config: DemoConfig, train: Callable[[Path], list[Measured]]) -> bool:
    """Train, and write and print what came of it; whether everything was done."""
    folder = directory(config)
    record, status = settings(config), "interrupted"
    write_json(folder / "config.json", {**record, "status": "running"})
    print(f"writing to {printable(folder)}", flush=True)
    try:
        if _report(config, folder, train(folder)):
            status = "finished"
    finally:
        write_json(folder / "config.json", {**record, "status": status})
    return status == "finished"


def _train_all(
    config: DemoConfig,
    device: torch.device,
    crew: Crew,
    stopped: Callable[[], bool],
    folder: Path | None,
) -> list[Measured]:
    """Train every method with every seed, or as much of it as there is time for.

    Args:
        config: What to do.
        device: Where.
        crew: With whom.
        stopped: Whether to stop.
        folder: For metrics and checkpoints; None to write nothing.
    """
    measured: list[Measured] = []

    def log(name: str, run: Run) -> None:
        settle(run)
        measured.append(Measured(name, run.config.seed, evaluation(run)))
        run.totals = nothing(device)  # what comes next is measured from here on
        run.epoch_seconds = 0.0
        if folder is not None:
            append_json_line(folder / "metrics.jsonl", as_line(measured[-1]))

    with bars(Console(stderr=True), shown=folder is not None) as progress:
        total = config.steps * config.seeds
        rows = {m.name: progress.add_task(m.label, total=total) for m in METHODS}
        for seed in range(config.seed, config.seed + config.seeds):
            runs = {m.name: _begun(train_config(m, config, seed), device, crew) for m in METHODS}
            for name, run in runs.items():
                log(name, run)
            _take_turns(
                runs,
                config.steps,
                stopped=stopped,
                tick=lambda name: progress.advance(rows[name]),
                log=log,
            )
            if folder is not None:
                for name, run in runs.items():
                    path = folder / f"{name}-seed-{seed}.pt"
                    write_bytes(path, tensor_bytes(gf.state_dict(run.state)))
            if stopped():
                break
    return measured


def _begun(config: TrainConfig, device: torch.device, crew: Crew) -> Run:
    run = begin(config, device, crew)
    state, totals, skipped = run.state, run.totals, run.skipped
    # What is loaded at a first step is not what a step costs; its results are not used.
    advance(run, 1)
    run.state, run.totals, run.skipped = state, totals, skipped
    run.done, run.seconds, run.epoch_seconds = 0, 0.0, 0.0
    return run


def _take_turns(
    runs: Mapping[str, Run],
    steps: int,
    *,
    stopped: Callable[[], bool],
    tick: Callable[[str], None],
    log: Callable[[str, Run], None],
) -> None:
    """Take turns from one evaluation to the next, so that whenever it ends all are about as far."""
    every = evaluate_every(steps)
    for until in range(every, steps + every, every):
        for name, run in runs.items():
            before = run.done
            advance(run, min(until, steps), stopped=stopped, tick=partial(tick, name))
            if run.done > before:
                log(name, run)


def _report(config: DemoConfig, folder: Path, measured: Sequence[Measured]) -> bool:
    """Draw and print what there is; say whether that is everything."""
    last = {(m.run, m.seed): m.evaluation.step for m in measured}
    finished = _finished_seeds(config, measured)
    # Half-trained seeds would make means of unlike things; alone they are better than nothing.
    shown = [m for m in measured if m.seed in finished] if finished else measured
    title = _title(config, len(finished), sorted(last.values()))
    write_bytes(folder / "curves.png", curves(shown, LABELS, title))
    print(title)
    # A file or pipe has no width of its own, and 80 columns would break the lines.
    Console(width=None if sys.stdout.isatty() else 120).print(comparison(shown, LABELS))
    checkpoints = len(list(folder.glob("*.pt")))
    print(
        f"wrote {printable(folder)}/: metrics.jsonl, config.json, curves.png and {checkpoints} "
        "checkpoints, RUN-seed-SEED.pt"
    )
    return len(finished) == config.seeds


def _finished_seeds(config: DemoConfig, measured: Sequence[Measured]) -> set[int]:
    """The seeds with which every method was trained to the end."""
    last = {(m.run, m.seed): m.evaluation.step for m in measured}
    return {seed for _, seed in last if all(last[n, seed] == config.steps for n in LABELS)}


def _title(config: DemoConfig, finished: int, steps: Sequence[int]) -> str:
    noise = f"digits, {100 * config.noise:g} % of the training labels wrong"
    if finished == config.seeds:
        seeds = f"mean ± sd of {config.seeds} seeds" if finished > 1 else f"seed {config.seed}"
        return f"{noise}, {config.steps} steps, {seeds}"
    if finished:
        return f"{noise}, interrupted: {finished} of {config.seeds} seeds finished"
    span = f"{steps[0]}" if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
    return f"{noise}, seed {config.seed}, interrupted after {span} of {config.steps} steps"
