"""A data set as its makers left it: before splits, noise and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradfilter.lab.data._folder_source import FolderSource

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Images, true labels and original indices of a part, in ascending order of the indices.

    Attributes:
        source: Raw pixels on the host, (n, channels, height, width) or files.
        labels: (n,)
        ids: (n,)
    """

    source: Tensor | FolderSource
    labels: Labels
    ids: NDArray[np.int64]

    def take(self, places: NDArray[np.int64]) -> Part:
        """The samples at these places, in ascending order."""
        places = np.sort(places)
        if isinstance(self.source, FolderSource):
            source: Tensor | FolderSource = self.source.take(places)
        else:
            source = self.source[places]
        return Part(source, self.labels[places], self.ids[places])


@dataclass(frozen=True)
class Origin:
    """A data set whose test split is fixed.

    Attributes:
        name: Without a path.
        classes: C.
        train: What train and val splits are made of.
        val: Where the makers gave one.
        test: As it is.
        full: The raw value of white.
        mean: Of every channel, in raw / full.
        std: The same.
        augmentable: Whether cropping and flipping leaves the class as it is.
    """

    name: str
    classes: int
    train: Part
    val: Part | None
    test: Part
    full: float
    mean: Sequence[float]
    std: Sequence[float]
    augmentable: bool
