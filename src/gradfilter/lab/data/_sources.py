"""Find data sets in their original form: CIFAR, digits, synthetic images, folders."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._random import random_for

# --- Image files by index, decoded on access ---


@dataclass(frozen=True)
class FolderSource:
    """Image files, decoded to bytes of one size: shorter side to 8/7 of it, then a centre crop.

    These are the usual 256 and 224 of ImageNet's evaluation, also in training: random crops and
    flips follow, for the whole batch at once.

    Attributes:
        paths: Paths of the files. (n)
        size: Height and width of decoded images, in pixels.
    """

    paths: Sequence[str]
    size: int

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return bytes (k, 3, size, size) of the files at these indices.

        Raises:
            UsageError: A file is not an image.
        """
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        places: list[int] = indices.tolist()
        decoded = [self._decoded(self.paths[i]) for i in places]
        return torch.stack(decoded) if decoded else empty

    def take(self, places: NDArray[np.int64]) -> FolderSource:
        """Return the files at these positions."""
        return FolderSource([self.paths[int(i)] for i in places], self.size)

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


# --- The form: before splits, noise and devices ---


Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Images, true labels and original indices of a part, in ascending order of the indices.

    Attributes:
        source: Raw pixels on the host, (n, channels, height, width) or files.
        labels: True labels. (n,)
        ids: Original indices. (n,)
    """

    source: Tensor | FolderSource
    labels: Labels
    ids: NDArray[np.int64]

    def take(self, places: NDArray[np.int64]) -> Part:
        """Return the samples at these positions, in ascending order."""
        places = np.sort(places)
        if isinstance(self.source, FolderSource):
            source: Tensor | FolderSource = self.source.take(places)
        else:
            source = self.source[places]
        return Part(source, self.labels[places], self.ids[places])


@dataclass(frozen=True)
class OriginalData:
    """A data set whose test split is fixed.

    Attributes:
        name: Name without a path.
        classes: Number of classes, C.
        train: Samples for the train and val splits.
        val: Published validation split, or None.
        test: Test split.
        full: Raw value of white.
        mean: Mean of every channel, in raw / full.
        std: Standard deviation of every channel, in raw / full.
        augmentable: Whether cropping and flipping keep the class.
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


# --- torchvision, imported on first use ---


def torchvision_datasets(name: str) -> Any:
    """Return the module ``torchvision.datasets``.

    Args:
        name: Name of the data set that needs it.

    Raises:
        UsageError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--data: expected torchvision for {name}, which is not installed. "
            'Run pip install "gradfilter[lab]".'
        ) from error


# --- CIFAR-10 and CIFAR-100 as torchvision stores them ---


NORMALISATION = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2009, 0.1984, 0.2023]),
}


def cifar(name: Literal["cifar10", "cifar100"], data_dir: Path, *, download: bool) -> OriginalData:
    """Read the 50 000 training and 10 000 test images, bytes, 3 x 32 x 32.

    Args:
        name: One of the two names.
        data_dir: Directory of ``cifar-10-batches-py`` or ``cifar-100-python``.
        download: Download missing files.

    Raises:
        UsageError: The data set is missing, damaged, or cannot be downloaded.
    """
    datasets = torchvision_datasets(name)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = (
        _cifar_part(kind, name, data_dir, train=train, download=download) for train in (True, False)
    )
    mean, std = NORMALISATION[name]
    classes = 10 if name == "cifar10" else 100
    return OriginalData(name, classes, train, None, test, 255, mean, std, augmentable=True)


def _cifar_part(kind: Any, name: str, data_dir: Path, *, train: bool, download: bool) -> Part:
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


# --- scikit-learn's digits: 1797 bundled images of 8 x 8 pixels ---


FULL = 16
TEST_FRACTION = 0.3


def digits(seed: int) -> OriginalData:
    """Split stratified 70/30 by ``seed``, and standardise with one mean and one deviation.

    Both are taken over all pixels of the training part, before validation samples are split off, so
    images do not change with the size of the validation split.
    """
    # Imported on use: the import takes a second, and --help does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    ids = train_test_split(
        np.arange(len(labels)),
        test_size=TEST_FRACTION,
        stratify=labels,
        random_state=int(random_for(seed, "split").integers(2**31)),
    )
    raw = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
    train, test = (Part(raw, labels.astype(np.int64), np.arange(len(raw))).take(i) for i in ids)
    seen = pixels[train.ids] / FULL
    return OriginalData(
        "digits",
        10,
        train,
        None,
        test,
        FULL,
        [float(seen.mean())],
        [float(seen.std())],
        augmentable=False,
    )


# --- Synthetic images: noise with balanced random labels ---


Kind = Literal["uniform", "normal", "hypersphere"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHAPE = (3, 32, 32)
CLASSES = 10
TRAIN, TEST = 1000, 200


def synthetic(kind: Kind) -> OriginalData:
    """Make 1000 training and 200 test images of 3 x 32 x 32, 10 classes, equal in every run.

    Labels can only be memorised: test accuracy is chance. After normalisation, every kind has about
    mean 0 and standard deviation 1 per pixel:

    | kind | raw pixels |
    |---|---|
    | uniform | U[0, 1), normalised with mean 1/2 and deviation 1/√12 |
    | normal | N(0, 1) |
    | hypersphere | uniform on the sphere of radius √3072 around 0: all images have one norm |
    """
    random = random_for(KINDS.index(kind), "images")
    n, d = TRAIN + TEST, int(np.prod(SHAPE))
    images = random.random((n, d)) if kind == "uniform" else random.standard_normal((n, d))
    if kind == "hypersphere":
        images *= sqrt(d) / np.linalg.norm(images, axis=1, keepdims=True)
    mean, std = (0.5, 1 / sqrt(12)) if kind == "uniform" else (0.0, 1.0)
    raw = torch.from_numpy(images).view(n, *SHAPE)
    labels = np.concatenate([random.permutation(np.arange(k) % CLASSES) for k in (TRAIN, TEST)])
    train, test = (
        Part(raw[part], labels[part], np.arange(len(labels[part])))
        for part in (slice(TRAIN), slice(TRAIN, n))
    )
    name = f"synthetic-{kind}"
    return OriginalData(
        name, CLASSES, train, None, test, 1, [mean] * 3, [std] * 3, augmentable=False
    )


# --- A folder of images with one folder per class ---


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def folder(path: Path, *, size: int) -> OriginalData:
    """Read ``path/train/CLASS/*``, ``path/val/CLASS/*`` and optionally ``path/test/CLASS/*``.

    Without ``test`` the folder ``val`` is the test split, as usual for ImageNet, and --val-split
    takes validation samples from ``train``.

    Args:
        path: The folder.
        size: Height and width of the images, in pixels. ImageNet's mean and deviation are used.

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
    parts = [_folder_part(found, size) for found in (train, *others)]
    return OriginalData(
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


def _folder_part(found: Any, size: int) -> Part:
    paths, labels = zip(*found.samples, strict=True)
    return Part(FolderSource(paths, size), np.array(labels, dtype=np.int64), np.arange(len(paths)))


# --- Find a data set by its name ---


HUMAN = "cifar100n-fine"
NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    f"{HUMAN}:FILE",
    "synthetic",
    *(f"synthetic-{kind}" for kind in KINDS),
    "folder:PATH",
)


def find(
    kind: str, path: str, *, data_dir: Path, download: bool, split_seed: int, image_size: int
) -> OriginalData:
    """Find a data set in its original form.

    Args:
        kind: Name before the colon.
        path: Text after the colon.
        data_dir: Directory of CIFAR, see `cifar`.
        download: Download CIFAR if it is missing.
        split_seed: Seed of the test split of digits.
        image_size: Size of images, see `folder`.

    Raises:
        UsageError: The name is unknown, or the data set is missing.
    """
    match kind, path:
        case "folder", path if path:
            return folder(Path(path), size=image_size)
        case "cifar100n-fine", _:
            return cifar("cifar100", data_dir, download=download)
        case (("cifar10" | "cifar100"), ""):
            return cifar(kind, data_dir, download=download)
        case "digits", "":
            return digits(split_seed)
        case "synthetic", "":
            return synthetic("uniform")
    for each in KINDS:
        if (kind, path) == (f"synthetic-{each}", ""):
            return synthetic(each)
    raise UsageError(
        f"--data: expected one of {', '.join(NAMES)}, found {f'{kind}:{path}' if path else kind!r}."
        " digits is the default and needs no download."
    )
