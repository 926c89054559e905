"""Connect the processes that torchrun started for one command, if there are several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import gradfilter as gf
from gradfilter.distributed import across_ranks
from gradfilter.distributed._ranks import LostRanksError, Ranks
from gradfilter.lab._processes import started_processes


@dataclass(frozen=True)
class Crew:
    """The processes that train together; each computes its part of every batch.

    Attributes:
        ranks: All ranks, or None for a single process.
    """

    ranks: Ranks | None = None

    @property
    def size(self) -> int:
        """How many, W."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def rank(self) -> int:
        """Return the rank of this process, 0 .. W − 1."""
        return 0 if self.ranks is None else self.ranks.rank

    @property
    def is_first(self) -> bool:
        """Return whether this process writes and prints."""
        return self.rank == 0

    def spread(self, reducer: gf.Transform) -> gf.Transform:
        """Return a reducer of the rows of all processes, with its own name in metrics and state."""
        return reducer if self.ranks is None else gf.chain(across_ranks(), reducer)

    def share(self, batches: Tensor) -> Tensor:
        """Return this process's part of every batch, rank by rank. (steps, N) -> (steps, N/W)."""
        if self.ranks is None:
            return batches
        return batches.reshape(len(batches), self.size, -1)[:, self.ranks.rank]

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over the processes."""
        return number if self.ranks is None else self.ranks.total(number) / self.size

    def meet(self) -> None:
        """Wait until all processes reach this call."""
        if self.ranks is not None:
            dist.barrier()

    def agreed(self, numbers: Sequence[float]) -> list[float]:
        """Return the first process's numbers, for decisions that all processes must share."""
        if self.ranks is None:
            return list(numbers)
        found: list[float] = self.ranks.gather_on_host(torch.tensor(numbers).double())[0].tolist()
        return found

    def together(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that is True on all processes once it is on one, so that none waits."""
        ranks = self.ranks
        if ranks is None:
            return asked
        return lambda: bool(ranks.gather_on_host(torch.tensor([asked()])).any())


ALONE = Crew()


@contextmanager
def connected(device: torch.device) -> Iterator[Crew]:
    """Connect the processes, if there are several.

    Args:
        device: Device of this process.
    """
    if started_processes() == 1:
        yield ALONE
        return
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    crew = Crew(Ranks.of(None))
    try:
        yield crew
        dist.barrier()  # no process leaves while another one still writes
    except LostRanksError as error:
        if crew.is_first:
            raise
        sys.exit(f"gradfilter: {error}")  # without a traceback: the error is in another process
    finally:
        dist.destroy_process_group()
