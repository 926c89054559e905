"""Images by index: raw pixels where they are kept, normalised where they are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
