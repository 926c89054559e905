"""Image files by index, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gradfilter.lab._usage import UsageError


@dataclass(frozen=True)
class FolderSource:
    """Image files, decoded to bytes of one size: shorter side to 8/7 of it, then the centre.

    That is the usual 256 and 224 of ImageNet's evaluation, in training as well: random crops and
    flips come afterwards, for the whole batch at once.

    Attributes:
        paths: Of the files. (n)
        size: Height and width of what comes out, in pixels.
    """

    paths: Sequence[str]
    size: int

    def __len__(self) -> int:
        """How many files."""
        return len(self.paths)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Bytes (k, 3, size, size) of the files at these indices.

        Raises:
            UsageError: A file is no image.
        """
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        decoded = [self._decoded(self.paths[i]) for i in indices.tolist()]
        return torch.stack(decoded) if decoded else empty

    def take(self, places: NDArray[np.int64]) -> FolderSource:
        """The files at these places."""
        return FolderSource([self.paths[i] for i in places], self.size)

    def _decoded(self, path: str) -> Tensor:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(
                f"--data: expected an image, found {path!r}, which cannot be read as one. "
                "Repair or remove it."
            ) from error
        scale = round(self.size * 8 / 7) / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
