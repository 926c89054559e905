"""An epoch is n samples seen, however they are drawn."""

from __future__ import annotations

from fractions import Fraction
from math import isfinite

from gradfilter.lab._usage import check


def steps_until(epochs: float, n: int, batch_size: int) -> int:
    """Steps until ``epochs`` · n samples are seen: ⌈epochs · n / batch_size⌉.

    Every step counts batch_size samples, so that trainings with one batch size are equally long for
    every number of microbatches and every kind of sampling.

    Args:
        epochs: At least 0; parts of an epoch are fine.
        n: Samples of the training split.
        batch_size: Samples of one step.

    Raises:
        UsageError: ``epochs`` is negative or not finite.

    Examples:
        >>> steps_until(2, 1257, 80)  # 2 514 samples: 31 whole batches and a part of one
        32
        >>> steps_until(1.1, 10, 1)  # 1.1 · 10 is a little more than 11 in floating point
        11
    """
    fix = "100 is usual, 0.5 is half an epoch."
    check(isfinite(epochs) and epochs >= 0, "--epochs", "a number of at least 0", epochs, fix)
    # The number that the user wrote, not the binary one next to it.
    return -(-Fraction(str(epochs)) * n // batch_size)
