"""Load a data set by name: find, split, corrupt labels, and place on a device."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._random import random_for
from gradfilter.lab.data._samples import Data, Images, Normalise, Samples
from gradfilter.lab.data._sources import HUMAN, FolderSource, Labels, Part, find

# --- Training and validation samples, stratified, with their own seed ---


Size = int | float | None
"""A count (int >= 1), a fraction (float in (0, 1)), or None for the default."""


def split(
    labels: NDArray[np.int64], train: Size, val: Size, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return disjoint positions of training and validation samples, each part stratified.

    The samples are sorted so that every beginning and every end is stratified, even one smaller
    than the number of classes: shuffled sample k of a class of size s has the key (k + u) / s, with
    one u in [0, 1) per class. Validation is the beginning and training the end, so the size of one
    part does not change the other.

    Args:
        labels: True labels. (n,)
        train: Size of the training part; None takes all samples that validation leaves.
        val: Size of the validation part; None takes no sample.
        seed: Seed of the split, at least 0.

    Raises:
        UsageError: A size is out of range, or both together are more than n.

    Examples:
        >>> labels = np.repeat([0, 1], [6, 3])
        >>> train, val = split(labels, None, 3, seed=0)
        >>> np.bincount(labels[val]), np.bincount(labels[train])
        (array([2, 1]), array([4, 2]))
    """
    n = len(labels)
    held_out = 0 if val is None else _count("--val-split", val, n)
    used = n - held_out if train is None else _count("--train-split", train, n)
    check(
        1 <= used <= n - held_out,
        "--train-split",
        f"at least 1 training sample, and with those for validation at most {n}",
        f"{used} + {held_out}",
        "Make one of the splits smaller.",
    )
    order = _stratified(labels, seed)
    return np.sort(order[n - used :]), np.sort(order[:held_out])


def _stratified(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    random = random_for(seed, "split")
    places = np.empty(len(labels))
    for label, size in enumerate(np.bincount(labels)):
        members = np.flatnonzero(labels == label)
        places[random.permutation(members)] = (np.arange(size) + random.random()) / max(size, 1)
    return np.argsort(places, kind="stable")


def _count(option: str, size: float, n: int) -> int:
    if isinstance(size, int) and size >= 1:
        return size
    if isinstance(size, float) and 0 < size < 1 and round(size * n) >= 1:
        return round(size * n)
    raise UsageError(
        f"{option}: expected a whole number of samples of at least 1, or a fraction in (0, 1) of "
        f"{n}, found {size}. Omit it for the default."
    )


# --- Label noise: exactly round(ρ · n) labels are wrong, for every type ---


NoiseType = Literal["symmetric", "pairflip", "class-concentrated"]
LabelArray = NDArray[np.int64]

# Tenths, because 0.8 · n is not always a whole number where 4/5 · n is.
CONCENTRATION = 8


def check_noise(noise: float, kind: str) -> None:
    """Refuse a noise that is not a fraction, or an unknown type.

    Raises:
        UsageError: ``noise`` is outside [0, 1), or ``kind`` is unknown.
    """
    fix = "0.3 makes 30 % of the training labels wrong."
    check(0 <= noise < 1, "--label-noise", "a fraction in [0, 1)", noise, fix)
    kinds = get_args(NoiseType)
    expected, fix = f"one of {', '.join(kinds)}", "symmetric is the default."
    check(kind in kinds, "--noise-type", expected, repr(kind), fix)


def corrupted(clean: LabelArray, noise: float, kind: str, *, classes: int, seed: int) -> LabelArray:
    """Change exactly m = round(ρ · n) of the labels, none to its true class.

    | type | which samples | new class of class c |
    |---|---|---|
    | symmetric | m of all | any other, uniformly |
    | pairflip | m of all | c + 1 mod C |
    | class-concentrated | 80 % of class 0, of class 1, ..., the rest from the next | any other |

    A pure function of its arguments, so every part of an experiment can recompute the noise.

    Args:
        clean: The true labels, 0 .. C − 1. (n,)
        noise: Fraction of wrong labels, ρ in [0, 1). m is rounded half to even.
        kind: One of the types above.
        classes: Number of classes, C.
        seed: Seed of the noise, at least 0.

    Raises:
        UsageError: A value is out of range, m > 0 with a single class, or m is more than 80 % of
            every class, summed.

    Examples:
        >>> clean = np.array([0, 1, 2, 0, 1, 2])
        >>> noisy = corrupted(clean, 0.5, "pairflip", classes=3, seed=0)
        >>> sorted(((noisy - clean) % 3).tolist())
        [0, 0, 0, 1, 1, 1]
    """
    check_noise(noise, kind)
    check(seed >= 0, "--label-seed", "at least 0", seed, "0 is a seed like any other.")
    count = round(noise * len(clean))
    fix = "With one class every label is right; use 0."
    check(count == 0 or classes > 1, "--label-noise", "0 for one class", noise, fix)
    random = random_for(seed, "noise")
    if kind == "class-concentrated":
        chosen = _concentrated(clean, count, classes, random)
    else:
        chosen = random.choice(len(clean), count, replace=False)
    # An offset of at least 1 never leads back to the true class.
    offsets = 1 if kind == "pairflip" else random.integers(1, max(classes, 2), count)
    noisy = clean.copy()
    noisy[chosen] = (clean[chosen] + offsets) % classes
    return noisy


def _concentrated(
    clean: LabelArray, count: int, classes: int, random: np.random.Generator
) -> NDArray[np.int64]:
    sizes = np.bincount(clean, minlength=classes)
    most = sizes * CONCENTRATION // 10
    check(
        count <= most.sum(),
        "--label-noise",
        f"at most {most.sum()} of {len(clean)} labels wrong, 80 % of every class",
        f"{count}",
        "Use less noise, or another --noise-type.",
    )
    before = most.cumsum() - most
    take = np.clip(count - before, 0, most)
    members = (random.permutation(np.flatnonzero(clean == c)) for c in range(classes))
    parts = [own[:k] for own, k in zip(members, take, strict=True)]
    return np.concatenate(parts)


# --- Human labels, read from an untrusted file ---


NOISY, CLEAN = "noisy_label", "clean_label"
PUBLISHED = "CIFAR-100_human.pt of https://github.com/UCSC-REAL/cifar-10-100n"

# The parts of a pickled array of integers, under the names of NumPy 1 and 2; nothing else is
# allowed. NumPy's own reduction gives the private function without a private import.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_INTEGERS = [type(np.dtype(code)) for code in "bBhHiIlLqQ"]
_ALLOWED: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *dict.fromkeys(_INTEGERS),
]


def human_labels(path: Path, clean: LabelArray, *, classes: int) -> LabelArray:
    """Read the labels in a file, one per sample of the training set in its original order.

    A torch file (a dict with ``noisy_label`` and ``clean_label``, as published), an .npz with the
    same names, an .npy, or a text file with one label per line. No code in the file is executed.

    Args:
        path: The file.
        clean: The true labels of the whole training set. (n,)
        classes: Number of classes, C; labels are 0 .. C − 1.

    Raises:
        UsageError: The file is missing, has other content, or belongs to another data set.

    References:
        Wei et al., "Learning with Noisy Labels Revisited: A Study Using Real-World Human
        Annotations", 2022, https://arxiv.org/abs/2110.12088
    """
    found = _read(path)
    noisy = _whole(path, NOISY, found.get(NOISY))
    for name, labels in ((NOISY, noisy), (CLEAN, found.get(CLEAN))):
        if labels is not None and len(_whole(path, name, labels)) != len(clean):
            raise _refusal(path, f"{len(labels)} labels in {name}", f"{len(clean)} labels")
    if CLEAN in found and not np.array_equal(_whole(path, CLEAN, found[CLEAN]), clean):
        raise _refusal(path, f"others in {CLEAN}", "the data set's own true labels")
    if noisy.min() < 0 or noisy.max() >= classes:
        raise _refusal(path, f"{noisy.min()} .. {noisy.max()}", f"labels 0 .. {classes - 1}")
    return noisy


def _read(path: Path) -> dict[str, Any]:
    check(path.is_file(), "--noise-file", "a file", repr(str(path)), f"Give it {PUBLISHED}.")
    try:
        if path.suffix == ".txt":
            return {NOISY: np.loadtxt(path, dtype=np.int64, ndmin=1)}
        if path.suffix == ".npy":
            return {NOISY: np.load(path, allow_pickle=False)}
        if path.suffix == ".npz":
            # Opened here, because NumPy does not close a broken archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # A warning of torch about a foreign pickle would be a second message.
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, "a pickle of something else, which was not executed") from error
    except Exception as error:  # errors of readers for damaged bytes have no common type
        raise _refusal(path, f"a file that cannot be read ({type(error).__name__})") from error
    return found if isinstance(found, dict) else {NOISY: found}


def _whole(path: Path, name: str, labels: Any) -> LabelArray:
    """Convert a list, array or tensor to int64."""
    if labels is None:
        raise _refusal(path, f"no {name!r}")
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError) as error:
        raise _refusal(path, f"{name!r} of another form") from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise _refusal(path, f"{name!r} of type {array.dtype}, shape {array.shape}")
    return array.astype(np.int64)


def _refusal(path: Path, found: str, expected: str = "one whole number per sample") -> UsageError:
    return UsageError(
        f"--noise-file: expected {expected}, found {found} in {str(path)!r}. Give it {PUBLISHED}."
    )


# --- Load ---


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
    """Load a data set by its name; equal arguments give an equal data set.

    Samples are in the order of the original data set, for all splits. Only training labels are
    corrupted, as a function of (true labels, noise, type, label seed). Nothing is downloaded unless
    `download` is True.

    Args:
        name: digits, cifar10, cifar100, cifar100n-fine (with ``noise_file``, or as
            cifar100n-fine:FILE), synthetic-uniform (or synthetic), synthetic-normal,
            synthetic-hypersphere, folder:PATH.
        data_dir: Directory of downloaded data sets.
        download: Download CIFAR if it is missing.
        data_split_seed: Seed of train and validation, and of the test split of digits.
        train_split: A count (int >= 1) or a fraction of the training part (float in (0, 1)); None
            takes all that validation leaves.
        val_split: A count or a fraction, taken from the training part; None takes no sample.
        label_noise: Fraction of wrong training labels, ρ in [0, 1).
        noise_type: symmetric, pairflip or class-concentrated; see `corrupted`.
        label_seed: Seed of the noise.
        noise_file: File of human labels; see `human_labels`.
        image_size: Height and width of images from folders, in pixels.
        device: Device of labels and normalised images.
        dtype: Dtype of normalised images.
        resident: Keep raw pixels on the device; otherwise on the host, for loader processes. Images
            from folders are never resident.

    Raises:
        UsageError: A value is out of range, or the data set is missing.

    Examples:
        >>> data = load_data("digits", label_noise=0.3, device=torch.device("cpu"))
        >>> data.train.images.fetch(torch.tensor([0, 1])).shape, int(data.train.wrong.sum())
        (torch.Size([2, 1, 8, 8]), 377)
    """
    check_noise(label_noise, noise_type)
    for option, seed in (("--data-split-seed", data_split_seed), ("--label-seed", label_seed)):
        check(seed >= 0, option, "at least 0", seed, "Use any whole number from 0 on.")
    kind, _, path = name.partition(":")
    people = None
    if kind == HUMAN:
        people = _human_file(path, noise_file, label_noise)
    else:
        fix = f"Only {HUMAN} has one; omit it."
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
        fix = "Omit it, or move the images."
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
    fix = "Omit --label-noise, or use cifar100."
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
