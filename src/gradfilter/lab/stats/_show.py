"""What ``gradfilter stats`` shows: the checkpoints, a bar, and a table of means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradfilter.lab.stats._output import read
from gradfilter.lab.stats._records import Nested
from gradfilter.lab.train._archive import Checkpoint


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of samples, and the function that moves it on; a log file wants none."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    ) as progress:
        bar = progress.add_task(label, total=total)
        yield lambda samples: progress.advance(bar, samples)


def listed(run: Path, saved: Sequence[Checkpoint]) -> str:
    """The checkpoints that there are, and how to choose one.

    Examples:
        >>> print(listed(Path("runs/a"), [Checkpoint(0, 0, 0.0), Checkpoint(1, 800, 12.5)]))
        checkpoints of runs/a
          --checkpoint 0   step 0, epoch 0
          --checkpoint 1   step 800, epoch 12.5
        or --last. Nothing was measured.
    """
    lines = [f"  --checkpoint {c.id:<3} step {c.step}, epoch {c.epoch:g}" for c in saved]
    return "\n".join([f"checkpoints of {run}", *lines, "or --last. Nothing was measured."])


def summary(paths: Sequence[Path]) -> str:
    """A table of the means, and where the numbers are."""
    found = [read(path) for path in paths]
    first = found[0]["metadata"]
    table = Table(title=f"{first['settings']['metric']}, {first['settings']['dataset_split']}")
    means = _columns(first)
    for column in ("checkpoint", "step", "epoch", "samples", *means, "not finite"):
        table.add_column(column, justify="right")
    for content in found:
        about = content["metadata"]
        at = about["checkpoint"]
        table.add_row(
            *(str(at["id"]), str(at["step"]), f"{at['epoch']:g}"),
            str(len(content["sample_ids"])),
            *(_number(value) for value in _columns(about).values()),
            str(about["nulls"]),
        )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get() + "\n".join(f"numbers in {path}" for path in paths)


def _columns(about: dict[str, Any]) -> dict[str, Nested]:
    """The aggregates of whole paths, by their headings."""
    aggregate = about["aggregate"]
    mean, names = aggregate["mean"], about["columns"]
    if about["axes"][0] == "batch":
        # What is better than a mean goes by the same name.
        by_name = {**dict(zip(names, mean, strict=True)), **aggregate}
        return {name.replace("_", " "): by_name[name] for name in names}
    if "direction" in about["axes"]:  # values along paths: there is one at the image
        return {"mean at the images": mean[0][0]}
    shown = {"mean": mean[-1]}
    if "lipschitz" in aggregate:
        shown["Lipschitz"] = aggregate["lipschitz"][-1]
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
