"""A data set by name: found, split, its labels corrupted, put where it is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gradfilter.lab._usage import check
from gradfilter.lab.data._find import HUMAN, find
from gradfilter.lab.data._folder_source import FolderSource
from gradfilter.lab.data._human_labels import PUBLISHED, human_labels
from gradfilter.lab.data._images import Images, Normalise
from gradfilter.lab.data._noise import check_noise, corrupted
from gradfilter.lab.data._origin import Labels, Part
from gradfilter.lab.data._samples import Data, Samples
from gradfilter.lab.data._split import Size, split


def load_data(
    name: str,
    *,
    data_dir: Path = Path("data"),
    download: bool = False,
    data_split_seed: int = 42,
    train_split: Size = None,
    val_split: Size = None,
    label_noise: float = 0.0,
    noise_type: str = "symmetric",
    label_seed: int = 0,
    noise_file: Path | None = None,
    image_size: int = 224,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    resident: bool = True,
) -> Data:
    """A data set by its name, the same whenever it is asked for.

    Samples are in the order of the original data set, whatever the splits. Only training labels are
    corrupted, by (their true values, noise, type, label seed) and nothing else. Nothing is
    downloaded unless that is asked for.

    Args:
        name: digits, cifar10, cifar100, cifar100n-fine (with ``noise_file``, or as
            cifar100n-fine:FILE), synthetic-uniform (or synthetic), synthetic-normal,
            synthetic-hypersphere, folder:PATH.
        data_dir: Where downloaded data sets are.
        download: Fetch CIFAR if it is not there.
        data_split_seed: Of train and validation, and of the test split of digits.
        train_split: A count (int >= 1) or a fraction of the training part (float in (0, 1)); None
            takes all that validation leaves.
        val_split: The same; None takes none. Taken from the training part.
        label_noise: ρ in [0, 1).
        noise_type: symmetric, pairflip or class-concentrated; see `corrupted`.
        label_seed: Of the noise.
        noise_file: Human labels; see `human_labels`.
        image_size: Height and width of images from folders, in pixels.
        device: Where images are computed with, and labels are.
        dtype: Of normalised images.
        resident: Keep raw pixels on the device; else on the host, for loader processes. Images from
            folders are never resident.

    Raises:
        UsageError: A value is out of range, or the data set is not there.

    Examples:
        >>> data = load_data("digits", label_noise=0.3, device=torch.device("cpu"))
        >>> data.train.images.fetch(torch.tensor([0, 1])).shape, int(data.train.wrong.sum())
        (torch.Size([2, 1, 8, 8]), 377)
    """
    check_noise(label_noise, noise_type)
    for option, seed in (("--data-split-seed", data_split_seed), ("--label-seed", label_seed)):
        check(seed >= 0, option, "at least 0", seed, "Any whole number from 0 on will do.")
    kind, _, path = name.partition(":")
    people = None
    if kind == HUMAN:
        people = _human_file(path, noise_file, label_noise)
    else:
        fix = f"Only {HUMAN} has one; leave it out."
        check(noise_file is None, "--noise-file", f"none for {kind}", repr(str(noise_file)), fix)
    origin = find(
        kind,
        path,
        data_dir=Path(data_dir),
        download=download,
        split_seed=data_split_seed,
        image_size=image_size,
    )
    trained = origin.train.labels
    if people is not None:
        trained = human_labels(people, trained, classes=origin.classes)
    if origin.val is None:
        places, held_out = split(origin.train.labels, train_split, val_split, seed=data_split_seed)
        val = origin.train.take(held_out)
    else:
        fix = "Leave it out, or move the images."
        check(val_split is None, "--val-split", "none: there is a folder val", val_split, fix)
        places, _ = split(origin.train.labels, train_split, None, seed=data_split_seed)
        val = origin.val
    train, labels = origin.train.take(places), trained[places]
    if people is None:
        labels = corrupted(
            train.labels, label_noise, noise_type, classes=origin.classes, seed=label_seed
        )
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1).to(device, dtype)
        for values in (origin.mean, origin.std)
    )
    normalise = Normalise(origin.full, mean, std)
    return Data(
        name=HUMAN if people is not None else origin.name,
        classes=origin.classes,
        shape=_shape(train),
        train=_samples(train, labels, normalise, resident),
        val=_samples(val, val.labels, normalise, resident),
        test=_samples(origin.test, origin.test.labels, normalise, resident),
        mean=mean,
        std=std,
        augmentable=origin.augmentable,
    )


def _human_file(path: str, noise_file: Path | None, label_noise: float) -> Path:
    fix = f"Add --noise-file with the {PUBLISHED}."
    check(bool(path) or noise_file is not None, "--data", f"a file for {HUMAN}", "none", fix)
    check(not path or noise_file is None, "--noise-file", "one file", "two", "Name it once.")
    fix = "Leave --label-noise out, or take cifar100."
    check(label_noise == 0, "--label-noise", f"0 for {HUMAN}", label_noise, fix)
    return Path(path) if path else Path(noise_file or "")


def _samples(part: Part, labels: Labels, normalise: Normalise, resident: bool) -> Samples:
    source, device = part.source, normalise.mean.device
    if isinstance(source, FolderSource):
        resident = False
    elif source.is_floating_point():
        source = source.to(normalise.mean.dtype)
    if resident and isinstance(source, Tensor):
        source = source.to(device)
    tensors = (torch.from_numpy(array).to(device) for array in (labels, part.labels, part.ids))
    return Samples(Images(source, normalise, resident), *tensors)


def _shape(part: Part) -> tuple[int, int, int]:
    if isinstance(part.source, FolderSource):
        return (3, part.source.size, part.source.size)
    channels, height, width = part.source.shape[1:]
    return channels, height, width
