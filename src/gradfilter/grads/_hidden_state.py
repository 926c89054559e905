"""Find a state of the loss that no search finds: evaluate twice, and compare.

A loss may keep a counter in an iterator, a NumPy array or a generator function. The search for the
state of a loss (`_state_owners`) does not see these, and every row of a pass over all rows would
get the same number. Such a loss gives other values if it is called again with the same arguments.
So one row is evaluated twice (loss and gradient), and the pass over all rows runs twice (losses).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter.grads._loss import RefusedByAll


class Probes:
    """Decides which passes run twice: the first, second, fourth, eighth, ... of one loss.

    So 1,000 steps make ten additional forward passes, and 20 of one row.
    """

    def __init__(self) -> None:
        self._passes = 0

    @override
    def __reduce__(self) -> Any:
        """Pickle without the number of passes, which is that of one process."""
        return (Probes, ())

    def due(self) -> bool:
        """Count a pass, and return whether it runs twice."""
        self._passes += 1
        return self._passes & (self._passes - 1) == 0


PROBED = 4
"""The difference between two passes of one kind, in units of eps: a state may change slowly."""


def nearly_equal(a: Tensor, b: Tensor, within: int = 64) -> bool:
    """Return whether two results of one computation are equal. This waits for the device.

    Args:
        a: The first result.
        b: The second result.
        within: The difference that threads may make, in units of eps of the largest number: they
            change the order of sums.
    """
    tolerance = within * torch.finfo(a.dtype).eps
    size = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return torch.allclose(a, b, tolerance, tolerance * size, equal_nan=True)


def hidden_state() -> RefusedByAll:
    """Return the error for a loss with a state that cannot be handed from row to row."""
    return RefusedByAll(
        "Expected a loss that gives the same values when it is called again with the same "
        "arguments, found others: it keeps a state (a counter, an iterator, a generator, an array) "
        "where it is not found, so that all rows would see the same state. Keep it in a buffer, in "
        'an attribute of a module or in a list, or pass plan="loop" from the start, which calls '
        "the loss once for each row, in order."
    )
