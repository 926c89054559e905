"""Make random numbers by purpose: draws for one purpose do not change another."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["split", "noise", "images", "shuffled", "balanced", "augment"]


def random_for(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """Return the generator of a purpose and, for example, a step; equal arguments, equal numbers.

    Args:
        seed: Seed, at least 0.
        purpose: Purpose of the numbers.
        counters: Numbers >= 0: a step, an epoch, a class.

    Examples:
        >>> numbers = random_for(0, "augment", 7).random(3)  # step 7 needs no steps 0 to 6
        >>> (numbers == random_for(0, "augment", 7).random(3)).all()
        np.True_
    """
    return np.random.default_rng([seed, *purpose.encode(), *counters])
