"""A folder of images with a folder per class, as ImageNet comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._folder_source import FolderSource
from gradfilter.lab.data._origin import Origin, Part
from gradfilter.lab.data._torchvision import torchvision_datasets

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def folder(path: Path, *, size: int) -> Origin:
    """``path/train/CLASS/*``, ``path/val/CLASS/*`` and perhaps ``path/test/CLASS/*``.

    Without ``test`` the folder ``val`` is the test split, as is the custom with ImageNet, and
    validation samples are taken from ``train`` when they are asked for.

    Args:
        path: The folder.
        size: Height and width of the images, in pixels; ImageNet's mean and deviation normalise.

    Raises:
        UsageError: A folder is missing or empty, or classes differ.
    """
    check(size >= 8, "--image-size", "at least 8", size, "224 is usual.")
    datasets = torchvision_datasets("folder:PATH")
    has_test = (path / "test").is_dir()
    train = _read(datasets, path / "train")
    others = [_read(datasets, path / name) for name in (["val", "test"] if has_test else ["val"])]
    for other in others:
        check(
            other.classes == train.classes,
            "--data",
            f"the {len(train.classes)} classes of {str(path / 'train')!r}",
            f"others in {other.root!r}: {sorted({*other.classes} ^ {*train.classes})}",
            "Every split needs the same folders.",
        )
    parts = [_part(found, size) for found in (train, *others)]
    return Origin(
        f"folder-{path.resolve().name}",
        len(train.classes),
        parts[0],
        parts[1] if has_test else None,
        parts[-1],
        255,
        MEAN,
        STD,
        augmentable=True,
    )


def _read(datasets: Any, path: Path) -> Any:
    try:
        return datasets.ImageFolder(str(path))
    except OSError as error:
        raise UsageError(
            f"--data: expected a folder per class with images in {str(path)!r}, found: "
            f"{' '.join(str(error).split())}. folder:PATH needs PATH/train and PATH/val."
        ) from error


def _part(found: Any, size: int) -> Part:
    paths, labels = zip(*found.samples, strict=True)
    return Part(FolderSource(paths, size), np.array(labels, dtype=np.int64), np.arange(len(paths)))
