"""What ``gradfilter stats`` shows: the checkpoints, a bar, and a table of means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradfilter.lab._reading import ForeignError, printable, reading
from gradfilter.lab.stats._output import Document, read
from gradfilter.lab.stats._records import Nested, shape_of
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


def listed(run: Path, saved: Sequence[Checkpoint], lost: Sequence[str] = ()) -> str:
    """The checkpoints that there are, and how to choose one.

    Args:
        run: The directory.
        saved: What there is, in order.
        lost: Entries that a damaged archive has in the place of some.

    Examples:
        >>> print(listed(Path("runs/a"), [Checkpoint(0, 0, 0.0), Checkpoint(1, 800, 12.5)]))
        checkpoints of runs/a
          --checkpoint 0   step 0, epoch 0
          --checkpoint 1   step 800, epoch 12.5
        or --last. Nothing was measured.
    """
    lines = [f"  --checkpoint {c.id:<3} step {c.step}, epoch {c.epoch:g}" for c in saved]
    lines += [f"  damaged: {printable(name)}" for name in lost]
    return "\n".join(
        [f"checkpoints of {printable(run)}", *lines, "or --last. Nothing was measured."]
    )


def summary(paths: Sequence[Path]) -> str:
    """A table of the means, and where the numbers are."""
    rows = []
    for path in paths:
        with reading(path, "the file of numbers", "Remove it, and measure again."):
            rows.append(_row(read(path)))
    first = rows[0]
    table = Table(title=first.title)
    for column in ("checkpoint", "step", "epoch", "samples", *first.means, "not finite"):
        table.add_column(escape(column), justify="right")
    for row in rows:
        means = (_number(value) for value in row.means.values())
        table.add_row(*row.at, str(row.samples), *means, str(row.nulls))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get() + "\n".join(f"numbers in {printable(path)}" for path in paths)


@dataclass(frozen=True)
class _Row:
    """What the table says about a file of numbers."""

    title: str
    at: tuple[str, str, str]
    samples: int
    means: dict[str, float | None]
    nulls: int


def _row(content: Document) -> _Row:
    about = content["metadata"]
    settings, at = about["settings"], about["checkpoint"]
    means = _columns(about)
    if any(shape_of(value) for value in means.values()):
        raise ForeignError("its means are not numbers")
    return _Row(
        escape(printable(f"{settings['metric']}, {settings['dataset_split']}")),
        (f"{at['id']:d}", f"{at['step']:d}", f"{at['epoch']:g}"),
        len(content["sample_ids"]),
        {printable(name): value for name, value in means.items()},
        int(about["nulls"]),
    )


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
    shown = {"mean": aggregate["mean"]}
    if "lipschitz" in aggregate:
        shown["Lipschitz"] = aggregate["lipschitz"]
    if "anchor" in about["axes"]:  # running means, of which the last is the whole path's
        return {name: numbers[-1] for name, numbers in shown.items()}
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
