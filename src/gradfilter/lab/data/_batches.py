"""Which samples a step sees: a pure function of (seed, step), so that a run resumes at any step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._random import Purpose, random_for

Order = Callable[[int, int], Tensor]
"""(first step, step after the last) -> indices (steps, N) int64, on the CPU."""


def shuffled(n: int, *, batch_size: int, seed: int) -> Order:
    """Batches of a shuffled training set; what fills no batch at a pass's end is left out.

    Pass p has a permutation of its own, from (seed, p); a pass is ⌊n / batch_size⌋ steps.

    Args:
        n: Samples.
        batch_size: N in 1 .. n.
        seed: At least 0.

    Raises:
        UsageError: No batch can be filled.

    Examples:
        >>> indices = shuffled(7, batch_size=3, seed=0)
        >>> indices(0, 2).flatten().unique().numel()  # one pass, of which one sample is left out
        6
        >>> torch.equal(indices(5, 6)[0], indices(0, 6)[5])  # a pure function of the step
        True
    """
    _check_size(batch_size)
    check(batch_size <= n, "--batch-size", f"at most {n}, the samples", batch_size, "Lower it.")
    used = n // batch_size * batch_size

    def indices(start: int, stop: int) -> Tensor:
        drawn = _rounds(np.arange(n), used, start * batch_size, stop * batch_size, seed, "shuffled")
        return torch.from_numpy(drawn).view(-1, batch_size)

    return indices


def class_balanced(
    labels: Tensor, *, classes: int, microbatches: int, per_class: int, seed: int
) -> Order:
    """Batches whose microbatches hold ``per_class`` samples of every class.

    Every class goes through its own samples in shuffled order and shuffles anew when it is through
    (round r of class c from (seed, c, r)), so small classes come round more often than large ones.
    N = M · C · m; microbatch i is entries i·C·m .. (i + 1)·C·m − 1, sorted by class.

    Args:
        labels: The labels that the run trains on. (n,)
        classes: C; labels are 0 .. C − 1.
        microbatches: M.
        per_class: m samples of every class in every microbatch.
        seed: At least 0.

    Raises:
        UsageError: A class has no sample.

    Examples:
        >>> labels = torch.tensor([0, 1, 0, 0, 1])
        >>> indices = class_balanced(labels, classes=2, microbatches=2, per_class=1, seed=0)
        >>> labels[indices(0, 2)]
        tensor([[0, 1, 0, 1],
                [0, 1, 0, 1]])
    """
    _check_size(microbatches, "--microbatches")
    _check_size(per_class, "--samples-per-class")
    host = labels.cpu().numpy()
    members = [np.flatnonzero(host == label) for label in range(classes)]
    for label, own in enumerate(members):
        if not len(own):
            raise UsageError(
                f"--samples-per-class: expected samples of every class, found none of class {label}"
                ". Use less label noise or more data, or leave the option out."
            )

    def indices(start: int, stop: int) -> Tensor:
        draws = start * microbatches * per_class, stop * microbatches * per_class
        by_class = np.stack(
            [_rounds(own, len(own), *draws, seed, "balanced", c) for c, own in enumerate(members)]
        )
        steps = rearrange(by_class, "c (s i m) -> s (i c m)", i=microbatches, m=per_class)
        return torch.from_numpy(np.ascontiguousarray(steps))

    return indices


def _rounds(
    members: NDArray[np.int64],
    used: int,
    start: int,
    stop: int,
    seed: int,
    purpose: Purpose,
    *counters: int,
) -> NDArray[np.int64]:
    """Draws start .. stop − 1 of shuffled rounds, each the first ``used`` of its permutation."""
    first, last = start // used, -(-stop // used)
    rounds = [
        random_for(seed, purpose, *counters, r).permutation(members)[:used]
        for r in range(first, last)
    ]
    drawn = np.concatenate([members[:0], *rounds])
    return drawn[start - first * used : stop - first * used]


def _check_size(value: int, option: str = "--batch-size") -> None:
    check(value >= 1, option, "at least 1", value, "1 is the smallest.")
