"""CIFAR-10 and CIFAR-100 as torchvision keeps them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._origin import Origin, Part
from gradfilter.lab.data._torchvision import torchvision_datasets

NORMALISATION = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2009, 0.1984, 0.2023]),
}


def cifar(name: Literal["cifar10", "cifar100"], data_dir: Path, *, download: bool) -> Origin:
    """The 50 000 training and 10 000 test images, bytes, 3 x 32 x 32.

    Args:
        name: Which of the two.
        data_dir: Where ``cifar-10-batches-py`` or ``cifar-100-python`` is or goes.
        download: Fetch what is not there; without it nothing ever is.

    Raises:
        UsageError: The data set is not there, damaged, or cannot be fetched.
    """
    datasets = torchvision_datasets(name)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = (
        _part(kind, name, data_dir, train=train, download=download) for train in (True, False)
    )
    mean, std = NORMALISATION[name]
    classes = 10 if name == "cifar10" else 100
    return Origin(name, classes, train, None, test, 255, mean, std, augmentable=True)


def _part(kind: Any, name: str, data_dir: Path, *, train: bool, download: bool) -> Part:
    try:
        found = kind(data_dir, train=train, download=download)
    except (RuntimeError, OSError) as error:
        where = f"{os.fspath(data_dir)!r} (folder {kind.base_folder})"
        if download:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"--download: expected to fetch {name} into {where}, found: {reason}. "
                f"Fetch {kind.url} elsewhere and unpack it there."
            ) from error
        raise UsageError(
            f"--data-dir: expected {name} in {where}, found none or a damaged one. "
            f"gradfilter train --download fetches it; or unpack {kind.url} there."
        ) from error
    pixels = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
    return Part(pixels, np.array(found.targets, dtype=np.int64), np.arange(len(pixels)))
