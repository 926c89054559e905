"""Class-balanced batches, all of them drawn before the training starts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def class_balanced(
    labels: NDArray[np.int64],
    classes: int,
    steps: int,
    microbatches: int,
    random: np.random.Generator,
    *,
    per_class: int = 1,
) -> NDArray[np.int64]:
    """Indices of batches whose microbatches hold ``per_class`` samples of every class.

    Every class goes through its own samples in shuffled order and shuffles anew when it is
    through, so small classes come round more often than large ones.

    Args:
        labels: The labels that the run trains on. (n,)
        classes: C; labels are 0 .. C − 1.
        steps: Batches to draw.
        microbatches: M.
        random: Where the order comes from.
        per_class: m samples of every class in every microbatch.

    Returns:
        (steps, M · C · m); microbatch i of a batch is entries i·C·m .. (i + 1)·C·m − 1.

    Raises:
        ValueError: A class has no sample.
    """
    draws = steps * microbatches * per_class
    queues = []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        if not len(members):
            raise ValueError(
                f"Expected samples of every class, found none of class {label}. Class-balanced "
                "microbatches need at least one; use less label noise or more data."
            )
        rounds = -(-draws // len(members))
        shuffled = random.permuted(np.tile(members, (rounds, 1)), axis=1)
        queues.append(shuffled.reshape(-1)[:draws])
    by_class = np.stack(queues)  # (C, steps · M · m)
    return (
        by_class.reshape(classes, steps, microbatches, per_class)
        .transpose(1, 2, 0, 3)
        .reshape(steps, -1)
    )
