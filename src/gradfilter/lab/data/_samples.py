"""The samples that a run trains and is measured on: raw pixels, normalised on access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# --- Images by index ---


class Source(Protocol):
    """Raw pixels by index, on one device; a tensor (n, channels, height, width) is one."""

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Raw pixels of the images at these indices (k,) int64: (k, channels, height, width)."""


@dataclass(frozen=True)
class Normalise:
    """Raw pixels to what a model sees: (raw / full − mean) / std, on the device, in the dtype.

    Attributes:
        full: The raw value of white: 255 for bytes.
        mean: Of every channel, in raw / full. (channels, 1, 1), on the device.
        std: The same. (channels, 1, 1)
    """

    full: float
    mean: Tensor
    std: Tensor

    def __call__(self, raw: Tensor) -> Tensor:
        """Normalised images (k, channels, height, width)."""
        return (raw.to(self.mean.dtype) / self.full - self.mean) / self.std


@dataclass(frozen=True)
class Images:
    """n images by index, in memory or on disk.

    Attributes:
        source: Raw pixels: a tensor on the device if resident, else something on the host.
        normalise: Applied to what is fetched.
        resident: Whether the source is a tensor on the device, so that no loader is needed.
    """

    source: Source
    normalise: Normalise
    resident: bool

    def __len__(self) -> int:
        """How many images."""
        return len(self.source)

    @property
    def device(self) -> torch.device:
        """Where fetched images are."""
        return self.normalise.mean.device

    def fetch(self, indices: Tensor) -> Tensor:
        """Normalised images (k, channels, height, width) on the device.

        Args:
            indices: (k,) int64, on any device.
        """
        if self.resident:
            return self.normalise(self.source[on_device(indices, self.device)])
        return self.normalise(on_device(self.source[indices.cpu()], self.device))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host does not wait for a copy onto an accelerator."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)


# --- Samples of a split ---


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
