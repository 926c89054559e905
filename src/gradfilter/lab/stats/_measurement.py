"""One metric of one checkpoint: from nothing, or from what is done already, to its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradfilter.lab._crew import Crew
from gradfilter.lab._reading import printable
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._samples import Samples
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._metrics import measure_of
from gradfilter.lab.stats._names import stem, with_range
from gradfilter.lab.stats._origin import origin
from gradfilter.lab.stats._output import document, join_ranges, origin_of, read, write
from gradfilter.lab.stats._parts import appending, finished, part_path, parts
from gradfilter.lab.stats._place import explained, locked
from gradfilter.lab.stats._recorder import recorder
from gradfilter.lab.stats._records import joined
from gradfilter.lab.stats._shards import Batch, missing, share
from gradfilter.lab.stats._show import progress_bar
from gradfilter.lab.train._restore import Restored

FOLDER = "stats"


@dataclass(frozen=True)
class Measurement:
    """What is to be measured, and where to.

    Attributes:
        config: What, and how.
        model: A checkpoint.
        samples: The split.
        start: First sample.
        stop: The one after the last.
        whole: Name of the file for all samples of the split, without its ending.
        path: The file that is made.
        facts: What the numbers depend on.
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
        """Of a checkpoint.

        Raises:
            UsageError: There are no such samples.
        """
        samples = getattr(model.data, config.dataset_split)
        start, stop = range_of(config, len(samples))
        whole = stem(config, model.checkpoint.id)
        name = with_range(whole, start, stop, len(samples))
        path = model.run / FOLDER / f"{name}.json"
        return cls(config, model, samples, start, stop, whole, path, origin(config, model))

    def carry_out(self, crew: Crew, stopped: Callable[[], bool]) -> bool:
        """Measure what is not measured yet, together, and write the file.

        Args:
            crew: With whom.
            stopped: Asked before every batch.

        Returns:
            Whether the file is there; else what is done is kept.

        Raises:
            UsageError: The file or parts of it were measured differently, another process is at
                work on it, or something cannot be written or does not fit into memory.
        """
        folder, name = self.path.parent, self.path.stem
        with locked(self.path, crew):
            if self.path.exists():
                self._refuse_other()
                if crew.is_first:
                    self._clear()  # killed just after the file was there
                return True
            done = [r for part in parts(folder, name) for r in finished(part, self.facts)]
            todo = missing(self.start, self.stop, done, self.config.batch_size)
            crew.meet()  # nobody writes before everybody has looked
            place = 0 if crew.ranks is None else crew.ranks.rank
            own = share(todo, place, crew.size)
            over = self._append(own, part_path(folder, name, place), crew.is_first, stopped)
            if crew.together(lambda: not over)():
                return False
            if crew.is_first:
                with explained(self.path):
                    self._merge()
            crew.meet()
        return True

    def _refuse_other(self) -> None:
        before = origin_of(read(self.path))
        names = {**before, **self.facts}
        differing = [name for name in names if before.get(name) != self.facts.get(name)]
        if differing:
            raise UsageError(
                f"{str(self.path)!r} is there already, with other {', '.join(differing)}. Remove "
                "it, or give --outname."
            )

    def _append(
        self, batches: Iterable[Batch], part: Path, shown: bool, stopped: Callable[[], bool]
    ) -> bool:
        """Measure batches, one after the other; whether all of them."""
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
        """Make one file of all parts, which are then removed."""
        there = parts(self.path.parent, self.path.stem)
        records = [record for part in there for record in finished(part, self.facts)]
        write(self.path, document(joined(records, self.start, self.stop), self.facts))
        self._clear()
        whole = join_ranges(self.path.parent, self.whole, len(self.samples))
        if whole is not None:
            print(f"the parts cover the split: wrote {printable(whole)}")

    def _clear(self) -> None:
        with explained(self.path):
            for part in parts(self.path.parent, self.path.stem):
                part.unlink(missing_ok=True)


def range_of(config: StatsConfig, total: int) -> tuple[int, int]:
    """First sample and the one after the last.

    Args:
        config: With --skip and --num-samples.
        total: Samples in the split.

    Raises:
        UsageError: There are not so many.
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
