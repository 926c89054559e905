"""Random numbers by purpose: more draws for one change nothing for another."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["split", "noise", "images", "shuffled", "balanced", "augment"]


def random_for(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A generator of its own for a purpose and, say, a step: the same whenever it is asked for.

    Args:
        seed: At least 0.
        purpose: What the numbers are for.
        counters: Each >= 0: a step, an epoch, a class.

    Examples:
        >>> numbers = random_for(0, "augment", 7).random(3)  # step 7 needs no steps 0 to 6
        >>> (numbers == random_for(0, "augment", 7).random(3)).all()
        np.True_
    """
    return np.random.default_rng([seed, *purpose.encode(), *counters])
