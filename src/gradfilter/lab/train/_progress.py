"""Show the progress of a training: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

from gradfilter.lab._run_files import printable
from gradfilter.lab.train._evaluation import Evaluation

log = logging.getLogger("gradfilter")


class _Printable(logging.Formatter):
    """Format log lines without control characters, so that names cannot move the cursor."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def logging_to(level: str) -> Iterator[Console]:
    """Write the package's log lines of this level and above to stderr."""
    console = Console(stderr=True)
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False, show_level=False)
        if console.is_terminal
        else logging.StreamHandler(console.file)
    )
    handler.setFormatter(_Printable())
    before = log.level
    log.setLevel(level.upper())
    log.addHandler(handler)
    try:
        yield console
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def bars(console: Console, shown: bool = True) -> Progress:
    """Return a display for bars, drawn on a terminal only: a log file needs none."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def progress_bar(
    console: Console, label: str, total: int, done: int
) -> Iterator[Callable[[], None]]:
    """Show a bar, and yield the function that moves it by one."""
    with bars(console) as progress:
        bar = progress.add_task(label, total=total, completed=done)
        yield lambda: progress.advance(bar)


def shown(evaluation: Evaluation) -> str:
    """Return an evaluation as a line for people, without what the run does not have."""
    parts = [f"train {100 * evaluation.train_accuracy:.1f} %"]
    if evaluation.step:  # before the first step there were no batches
        parts.insert(0, f"loss {_loss(evaluation)}")
    for label, value in (
        ("memorised", evaluation.memorised),
        ("val", evaluation.val_accuracy),
        ("test", evaluation.test_accuracy),
        ("accepted rows", evaluation.accepted),
        ("clipped rows", evaluation.clipped_rows),
        ("clipped units", evaluation.clipped_units),
    ):
        if not math.isnan(value):
            parts.append(f"{label} {100 * value:.1f} %")
    if evaluation.skipped:
        parts.append(f"skipped steps {100 * evaluation.skipped / evaluation.step:.1f} %")
    return f"epoch {evaluation.epoch:.4g}, step {evaluation.step}: {', '.join(parts)}"


def _loss(evaluation: Evaluation) -> str:
    """Return the mean loss of the batches, or nan once the loss of the training set is NaN."""
    if not math.isfinite(evaluation.train_loss):
        return "nan"
    return f"{evaluation.loss:.4f}" if evaluation.loss < 1e6 else f"{evaluation.loss:.4g}"
