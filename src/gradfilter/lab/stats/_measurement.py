"""Measure one metric of one checkpoint, resume where a measurement stopped, and show progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradfilter.distributed._ranks import Ranks
from gradfilter.lab._run_files import ForeignError, printable, reading
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._samples import Samples
from gradfilter.lab.stats._metrics import measure_of
from gradfilter.lab.stats._recorder import recorder
from gradfilter.lab.stats._stats_config import StatsConfig
from gradfilter.lab.stats._stats_files import (
    Document,
    Nested,
    StatsRecord,
    appending,
    document,
    finished,
    join_ranges,
    join_records,
    locked,
    origin,
    origin_of,
    part_path,
    parts,
    read,
    shape_of,
    stats_errors_as_usage,
    stem,
    with_range,
    write,
)
from gradfilter.lab.train._archive import Checkpoint
from gradfilter.lab.train._restore import Restored

# --- Output: the checkpoints, a progress bar, and a table of means ---


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of samples, and yield the function that advances it; none in a log file."""
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
    """List the checkpoints, and how to choose one.

    Args:
        run: The run directory.
        saved: The checkpoints, in order.
        lost: Entries of a damaged archive that are not usable checkpoints.

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
    """Return a table of the means, and the paths of the files with the numbers."""
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
    """One row of the table: a file of numbers."""

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
    """Return the aggregates of whole paths, by column heading."""
    aggregate = about["aggregate"]
    mean, names = aggregate["mean"], about["columns"]
    if about["axes"][0] == "batch":
        # Some aggregates replace a mean under the same name.
        by_name = {**dict(zip(names, mean, strict=True)), **aggregate}
        return {name.replace("_", " "): by_name[name] for name in names}
    if "direction" in about["axes"]:  # values along paths: the first is at the image
        return {"mean at the images": mean[0][0]}
    shown = {"mean": aggregate["mean"]}
    if "lipschitz" in aggregate:
        shown["Lipschitz"] = aggregate["lipschitz"]
    if "anchor" in about["axes"]:  # running means: the last is that of the whole path
        return {name: numbers[-1] for name, numbers in shown.items()}
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


# --- Shards: which process measures which batches ---


Batch = tuple[int, int]
"""Positions in the split: the first, and the one after the last."""


def missing(start: int, stop: int, done: Iterable[StatsRecord], batch_size: int) -> list[Batch]:
    """Return the batches that are still to be measured.

    Batches always start at ``start``, independently of what is done and of the number of processes.
    So every sample is measured in the same batch as in an uninterrupted measurement.

    Args:
        start: Position of the first sample.
        stop: Position after the last sample.
        done: The records that exist.
        batch_size: Number of samples of every batch except the last.

    Examples:
        >>> missing(0, 10, [StatsRecord(4, 8, [], [], [], [])], 4)
        [(0, 4), (8, 10)]
    """
    batches = []
    place = start
    edges = [*sorted((record.start, record.stop) for record in done), (stop, stop)]
    for begin, end in edges:
        while place < begin:
            cut = place + batch_size - (place - start) % batch_size
            batches.append((place, min(cut, begin)))
            place = batches[-1][1]
        place = max(place, end)
    return batches


def share(batches: Sequence[Batch], rank: int, size: int) -> Sequence[Batch]:
    """Return the batches of one process; the numbers of batches differ by at most one.

    Examples:
        >>> [share([(0, 4), (4, 8), (8, 10)], rank, 2) for rank in range(2)]
        [[(0, 4)], [(4, 8), (8, 10)]]
    """
    return batches[len(batches) * rank // size : len(batches) * (rank + 1) // size]


# --- The measurement ---


FOLDER = "stats"


@dataclass(frozen=True)
class Measurement:
    """A measurement of one metric of one checkpoint, and its output file.

    Attributes:
        config: Checked settings.
        model: The restored checkpoint.
        samples: Samples of the split.
        start: Position of the first sample.
        stop: Position after the last sample.
        whole: Name of the file for all samples of the split, without its suffix.
        path: The output file.
        facts: Everything that the numbers depend on.
    """

    config: StatsConfig
    model: Restored
    samples: Samples
    start: int
    stop: int
    whole: str
    path: Path
    facts: dict[str, Any]

    @classmethod
    def of(cls, config: StatsConfig, model: Restored) -> Measurement:
        """Prepare the measurement of a checkpoint.

        Raises:
            UsageError: The split does not have these samples.
        """
        samples = getattr(model.data, config.dataset_split)
        start, stop = range_of(config, len(samples))
        whole = stem(config, model.checkpoint.id)
        name = with_range(whole, start, stop, len(samples))
        path = model.run / FOLDER / f"{name}.json"
        return cls(config, model, samples, start, stop, whole, path, origin(config, model))

    def run(self, ranks: Ranks, stopped: Callable[[], bool]) -> bool:
        """Measure the missing batches, together with other processes, and write the file.

        Args:
            ranks: The processes that measure together.
            stopped: Called before each batch; True stops the measurement.

        Returns:
            Whether the file is complete; otherwise the finished batches are kept.

        Raises:
            UsageError: The file or parts of it were measured differently, another process is
                writing it, a file cannot be written, or a batch does not fit into memory.
        """
        folder, name = self.path.parent, self.path.stem
        with locked(self.path, ranks):
            if self.path.exists():
                self._refuse_other()
                if ranks.is_first:
                    self._clear()  # a previous process was killed after it wrote the file
                return True
            done = [r for part in parts(folder, name) for r in finished(part, self.facts)]
            todo = missing(self.start, self.stop, done, self.config.batch_size)
            ranks.wait_for_all()  # no process writes before all have looked
            place = ranks.rank
            own = share(todo, place, ranks.size)
            over = self._append(own, part_path(folder, name, place), ranks.is_first, stopped)
            if ranks.on_any(lambda: not over)():
                return False
            if ranks.is_first:
                with stats_errors_as_usage(self.path):
                    self._merge()
            ranks.wait_for_all()
        return True

    def _refuse_other(self) -> None:
        before = origin_of(read(self.path))
        names = {**before, **self.facts}
        differing = [name for name in names if before.get(name) != self.facts.get(name)]
        if differing:
            raise UsageError(
                f"{str(self.path)!r} already exists, with other {', '.join(differing)}. Remove "
                "it, or give --outname."
            )

    def _append(
        self, batches: Iterable[Batch], part: Path, shown: bool, stopped: Callable[[], bool]
    ) -> bool:
        """Measure batches one after the other; return whether all were measured."""
        config, batches = self.config, list(batches)
        record = recorder(config, self.samples, measure_of(config, self.model))
        total = sum(stop - start for start, stop in batches)
        label = f"{config.metric}, checkpoint {self.model.checkpoint.id}"
        with appending(part, self.facts) as append, progress_bar(label, total, shown) as tick:
            for start, stop in batches:
                if stopped():
                    return False
                try:
                    found = record(start, stop)
                except torch.OutOfMemoryError:
                    raise UsageError(
                        f"--batch-size: {stop - start} samples at once do not fit into memory. "
                        "Give a smaller one; the batches that were finished are kept."
                    ) from None
                append(found)
                tick(stop - start)
        return True

    def _merge(self) -> None:
        """Merge all parts into one file, then remove them."""
        there = parts(self.path.parent, self.path.stem)
        records = [record for part in there for record in finished(part, self.facts)]
        write(self.path, document(join_records(records, self.start, self.stop), self.facts))
        self._clear()
        whole = join_ranges(self.path.parent, self.whole, len(self.samples))
        if whole is not None:
            print(f"the parts cover the split: wrote {printable(whole)}")

    def _clear(self) -> None:
        with stats_errors_as_usage(self.path):
            for part in parts(self.path.parent, self.path.stem):
                part.unlink(missing_ok=True)


def range_of(config: StatsConfig, total: int) -> tuple[int, int]:
    """Return the position of the first sample and that after the last.

    Args:
        config: Settings; `skip` and `num_samples` are read.
        total: Number of samples in the split.

    Raises:
        UsageError: The split has fewer samples.
    """
    split = f"--dataset-split {config.dataset_split}"
    if not total:
        raise UsageError(f"{split}: the run has no such samples. Choose another.")
    if config.skip >= total:
        raise UsageError(
            f"--skip: expected less than {total}, the samples of {split}, found {config.skip}. "
            "0 is the default."
        )
    stop = total if config.num_samples is None else config.skip + config.num_samples
    if stop > total:
        raise UsageError(
            f"--num-samples: expected at most {total - config.skip} after --skip {config.skip}, "
            f"found {config.num_samples}. {split} has {total}."
        )
    return config.skip, stop
