"""What a run trains and is measured on: splits of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradfilter.lab.data._images import Images


@dataclass(frozen=True)
class Samples:
    """One split: image, label, clean label and place in the original data set of every sample.

    Attributes:
        images: n images by index.
        labels: What a run trains on, some of it wrong. (n,) int64, on the device
        clean: The true labels. (n,)
        ids: Index in the original data set, in ascending order. (n,)
    """

    images: Images
    labels: Tensor
    clean: Tensor
    ids: Tensor

    def __len__(self) -> int:
        """How many samples."""
        return len(self.labels)

    @property
    def wrong(self) -> Tensor:
        """Which labels are wrong. (n,) bool."""
        return self.labels != self.clean


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        name: As users say it; without a path.
        classes: C.
        shape: Of one image: (channels, height, width).
        train: Its labels may be wrong on purpose; those of val and test are clean.
        val: May be empty.
        test: Not used for any choice.
        mean: Images are (raw in [0, 1] − mean) / std. (channels, 1, 1)
        std: The same. (channels, 1, 1)
        augmentable: Whether cropping and flipping leaves the class as it is.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    train: Samples
    val: Samples
    test: Samples
    mean: Tensor
    std: Tensor
    augmentable: bool
