"""scikit-learn's digits with wrong labels: 1797 images of 8 x 8 pixels, bundled, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
TEST_FRACTION = 0.3

Labels = NDArray[np.int64]


def stream(seed: int, purpose: Literal["split", "noise", "init", "batches"]) -> np.random.Generator:
    """The random numbers of one purpose: more draws for one do not change those of another."""
    return np.random.default_rng([seed, *purpose.encode()])


@dataclass(frozen=True)
class Digits:
    """A split of the digits, all of it on one device.

    Attributes:
        images: Training images, standardised. (n, 64)
        labels: What a run trains on, some of it wrong. (n,)
        clean: The true labels of the training images. (n,)
        test_images: Standardised with the training images' mean and deviation. (t, 64)
        test_labels: Clean. (t,)
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which training labels are wrong. (n,) bool."""
        return self.labels != self.clean


def noisy_digits(
    noise: float, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Digits:
    """A stratified 70/30 split; a fraction ``noise`` of the training labels is wrong.

    Pixels are divided by 16 and standardised with the one mean and the one standard deviation
    of the training part.

    Args:
        noise: In [0, 1).
        seed: Of the split and of the noise, each with random numbers of its own.
        device: Where all tensors are put.
        dtype: Of the images.
    """
    images, labels = load_digits(return_X_y=True)
    train, test, clean, test_labels = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int64),
        test_size=TEST_FRACTION,
        stratify=labels,
        random_state=int(stream(seed, "split").integers(2**31)),
    )
    mean, deviation = train.mean(), train.std()
    noisy = corrupted(clean, noise, stream(seed, "noise"))
    arrays = ((train - mean) / deviation, noisy, clean, (test - mean) / deviation, test_labels)
    tensors = (torch.from_numpy(array).to(device) for array in arrays)
    return Digits(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))


def corrupted(clean: Labels, noise: float, random: np.random.Generator) -> Labels:
    """Symmetric label noise: exactly round(noise · n) labels change, to any other class alike.

    Args:
        clean: The true labels, 0 .. 9. (n,)
        noise: In [0, 1).
        random: Where the choice of samples and of wrong classes comes from.
    """
    count = round(noise * len(clean))
    chosen = random.choice(len(clean), count, replace=False)
    noisy = clean.copy()
    # An offset from 1 on can never lead back onto the true class.
    noisy[chosen] = (clean[chosen] + random.integers(1, CLASSES, count)) % CLASSES
    return noisy
