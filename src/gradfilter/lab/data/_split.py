"""Training and validation samples, stratified, by a seed of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._random import random_for

Size = int | float | None
"""A count (int >= 1), a fraction (float in (0, 1)), or None for the default."""


def split(
    labels: NDArray[np.int64], train: Size, val: Size, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the training and of the validation samples, disjoint, each part stratified.

    The samples are put in one order in which every beginning and every end is stratified, also
    those smaller than the number of classes: sample k of a class of size s, shuffled, stands at
    (k + u) / s, one u in [0, 1) per class. Validation is the beginning, training the end, so that
    the size of one changes nothing for the other.

    Args:
        labels: True labels. (n,)
        train: None takes what validation leaves.
        val: None takes nothing.
        seed: At least 0.

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
        f"{n}, found {size}. Leave it out for the default."
    )
