"""Raw pixels of batch after batch, from the device or from loader processes."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._images import Images, Source, on_device


def raw_batches(
    images: Images, rows: Sequence[Tensor], workers: int
) -> Generator[Tensor, None, None]:
    """Raw pixels on the device, a batch for each row; resident images need no workers.

    Args:
        images: n images.
        rows: (k,) int64 each.
        workers: At least 0, processes; they end with the generator.

    Raises:
        UsageError: ``workers`` < 0, or an image cannot be read.
    """
    check(workers >= 0, "--workers", "at least 0", workers, "0 loads in the process itself.")
    if images.resident:
        for row in rows:
            yield images.source[on_device(row, images.device)]
        return
    loader: DataLoader[Tensor | str] = DataLoader(
        _Rows(images.source, [row.cpu().numpy() for row in rows]),
        batch_size=None,  # an item is a batch
        num_workers=min(workers, len(rows)),
        worker_init_fn=_unasked,
        pin_memory=images.device.type == "cuda",
        generator=torch.Generator(),  # otherwise it would draw from everybody's random numbers
    )
    for loaded in loader:
        if isinstance(loaded, str):
            raise UsageError(loaded)
        yield on_device(loaded, images.device)


def _unasked(worker: int) -> None:
    """Leave Ctrl-C and a polite kill, which every process is sent, to the one that loads.

    That one ends its loaders itself, and they end when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Rows(Dataset[Tensor | str]):
    """Batch k of a source. Arrays, as tensors would take a file descriptor each on their way."""

    source: Source
    rows: Sequence[NDArray[Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Tensor | str:
        try:
            return self.source[torch.from_numpy(self.rows[step])]
        except UsageError as error:
            # As a value: an exception of another process arrives with that one's traceback.
            return str(error)
