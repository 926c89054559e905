"""Label noise: exactly round(ρ · n) labels are wrong, whatever the type."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradfilter.lab._usage import check
from gradfilter.lab.data._random import random_for

NoiseType = Literal["symmetric", "pairflip", "class-concentrated"]
Labels = NDArray[np.int64]

# Tenths, because 0.8 · n is not always a whole number where 4/5 · n is.
CONCENTRATION = 8


def check_noise(noise: float, kind: str) -> None:
    """Refuse what is no fraction or no type.

    Raises:
        UsageError: ``noise`` is outside [0, 1), or ``kind`` is unknown.
    """
    fix = "0.3 makes 30 % of the training labels wrong."
    check(0 <= noise < 1, "--label-noise", "a fraction in [0, 1)", noise, fix)
    kinds = get_args(NoiseType)
    expected, fix = f"one of {', '.join(kinds)}", "symmetric is the default."
    check(kind in kinds, "--noise-type", expected, repr(kind), fix)


def corrupted(clean: Labels, noise: float, kind: str, *, classes: int, seed: int) -> Labels:
    """The labels with exactly m = round(ρ · n) of them changed, none onto its true class.

    | type | which samples | new class of class c |
    |---|---|---|
    | symmetric | m of all | any other, all alike |
    | pairflip | m of all | c + 1 mod C |
    | class-concentrated | 80 % of class 0, of class 1, ..., the rest from the next | any other |

    A pure function of its arguments: every part of an experiment that knows them knows the noise.

    Args:
        clean: The true labels, 0 .. C − 1. (n,)
        noise: ρ in [0, 1). m is rounded as Python does it: a half to the even neighbour.
        kind: One of the types above.
        classes: C.
        seed: At least 0.

    Raises:
        UsageError: A value is out of range, m > 0 with a single class, or m is more than 80 % of
            every class adds up to.

    Examples:
        >>> clean = np.array([0, 1, 2, 0, 1, 2])
        >>> noisy = corrupted(clean, 0.5, "pairflip", classes=3, seed=0)
        >>> sorted(((noisy - clean) % 3).tolist())
        [0, 0, 0, 1, 1, 1]
    """
    check_noise(noise, kind)
    check(seed >= 0, "--label-seed", "at least 0", seed, "0 is a seed like any other.")
    count = round(noise * len(clean))
    fix = "With one class no label can be wrong; use 0."
    check(count == 0 or classes > 1, "--label-noise", "0 for one class", noise, fix)
    random = random_for(seed, "noise")
    if kind == "class-concentrated":
        chosen = _concentrated(clean, count, classes, random)
    else:
        chosen = random.choice(len(clean), count, replace=False)
    # An offset from 1 on can never lead back onto the true class.
    offsets = 1 if kind == "pairflip" else random.integers(1, max(classes, 2), count)
    noisy = clean.copy()
    noisy[chosen] = (clean[chosen] + offsets) % classes
    return noisy


def _concentrated(
    clean: Labels, count: int, classes: int, random: np.random.Generator
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
