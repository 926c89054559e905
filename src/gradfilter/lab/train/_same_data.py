"""Whether a data set is the one that a run began with."""

from __future__ import annotations

from pathlib import Path

import torch

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._samples import Data
from gradfilter.lab.train._archive import LABELS, NAME, read_tensors


def check_same_data(run: Path, data: Data) -> None:
    """Refuse a data set that is not the one that a run began with.

    Raises:
        UsageError: Its labels or samples differ.
    """
    recorded = read_tensors(run / NAME, LABELS)
    for name in ("labels", "clean", "ids"):
        found = getattr(data.train, name).cpu()
        before = recorded.get(name, found[:0])
        if before.dtype != found.dtype or not torch.equal(found, before):
            raise UsageError(
                f"the {name} of {data.name!r} are not those that the run in {str(run)!r} was "
                "trained on. Look for the same data set, with --data-dir."
            )
