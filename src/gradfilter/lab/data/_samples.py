"""Hold the samples of a run: raw pixels, normalised on access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# --- Images by index ---


class Source(Protocol):
    """Raw pixels by index, on one device; a tensor (n, channels, height, width) is one."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return raw pixels (k, channels, height, width) of the images at indices (k,) int64."""
        ...


@dataclass(frozen=True)
class Normalise:
    """Normalise raw pixels: (raw / full − mean) / std, on the device, in the dtype.

    Attributes:
        full: Raw value of white: 255 for bytes.
        mean: Mean of every channel, in raw / full. (channels, 1, 1), on the device.
        std: Standard deviation of every channel. (channels, 1, 1)
    """

    full: float
    mean: Tensor
    std: Tensor

    def __call__(self, raw: Tensor) -> Tensor:
        """Return normalised images (k, channels, height, width)."""
        return (raw.to(self.mean.dtype) / self.full - self.mean) / self.std


@dataclass(frozen=True)
class Images:
    """Images by index, in memory or on disk.

    Attributes:
        source: Raw pixels: a tensor on the device if resident, else a source on the host.
        normalise: Normalisation of fetched images.
        resident: Whether the source is a tensor on the device, so that no loader is needed.
    """

    source: Source
    normalise: Normalise
    resident: bool

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    @property
    def device(self) -> torch.device:
        """Return the device of fetched images."""
        return self.normalise.mean.device

    def fetch(self, indices: Tensor) -> Tensor:
        """Return normalised images (k, channels, height, width) on the device.

        Args:
            indices: Indices (k,) int64, on any device.
        """
        if self.resident:
            return self.normalise(self.source[on_device(indices, self.device)])
        return self.normalise(on_device(self.source[indices.cpu()], self.device))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; the host does not wait for an accelerator."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)


# --- Samples of a split ---


@dataclass(frozen=True)
class Samples:
    """One split: image, label, clean label and original index of every sample.

    Attributes:
        images: The images by index.
        labels: Labels to train on, some of them wrong. (n,) int64, on the device
        clean: True labels. (n,)
        ids: Index in the original data set, in ascending order. (n,)
    """

    images: Images
    labels: Tensor
    clean: Tensor
    ids: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    @property
    def wrong(self) -> Tensor:
        """Return which labels are wrong. (n,) bool."""
        return self.labels != self.clean


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        name: Name as users type it, without a path.
        classes: Number of classes, C.
        shape: Shape of one image: (channels, height, width).
        train: Training split; only its labels may be wrong on purpose.
        val: Validation split, may be empty.
        test: Test split, not used for any choice.
        mean: Mean of every channel; images are (raw in [0, 1] − mean) / std. (channels, 1, 1)
        std: Standard deviation of every channel. (channels, 1, 1)
        augmentable: Whether cropping and flipping keep the class.
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
