"""Labels that people gave, read from a file that need not be trusted."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradfilter.lab._usage import UsageError, check

Labels = NDArray[np.int64]

NOISY, CLEAN = "noisy_label", "clean_label"
PUBLISHED = "CIFAR-100_human.pt of https://github.com/UCSC-REAL/cifar-10-100n"

# What a pickled array of integers is made of, under the names of NumPy 1 and 2; nothing else is let
# in. NumPy's own reduction is where the private function can be had from without a private import.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_INTEGERS = [type(np.dtype(code)) for code in "bBhHiIlLqQ"]
_ALLOWED: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *dict.fromkeys(_INTEGERS),
]


def human_labels(path: Path, clean: Labels, *, classes: int) -> Labels:
    """The labels in the file, one for every sample of the training set in its original order.

    A torch file (a dict with ``noisy_label`` and ``clean_label``, as published), an .npz with the
    same names, an .npy, or a text file with one label a line. Nothing in the file is executed.

    Args:
        path: The file.
        clean: The true labels of the whole training set. (n,)
        classes: C; labels are 0 .. C − 1.

    Raises:
        UsageError: The file is not there, holds something else, or belongs to another data set.

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
            # Opened here, for NumPy leaves a broken archive open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # What torch says of a foreign pickle before it refuses it would be a second message.
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, "a pickle of something else, which was not executed") from error
    except Exception as error:  # what readers raise of damaged bytes has no common type
        raise _refusal(path, f"a file that cannot be read ({type(error).__name__})") from error
    return found if isinstance(found, dict) else {NOISY: found}


def _whole(path: Path, name: str, labels: Any) -> Labels:
    """A list, array or tensor as int64."""
    if labels is None:
        raise _refusal(path, f"no {name!r}")
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError) as error:
        raise _refusal(path, f"{name!r} of another form") from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise _refusal(path, f"{name!r} of type {array.dtype}, shape {array.shape}")
    return array.astype(np.int64)


def _refusal(path: Path, found: str, expected: str = "one whole number a sample") -> UsageError:
    return UsageError(
        f"--noise-file: expected {expected}, found {found} in {str(path)!r}. Give it {PUBLISHED}."
    )
