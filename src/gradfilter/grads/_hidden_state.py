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


PIECE = 2**22
"""The numbers that are compared at a time, because a comparison makes several copies."""


def nearly_equal(a: Tensor | list[Tensor], b: Tensor | list[Tensor], within: int = 64) -> bool:
    """Return whether two results of one computation are equal. This waits for the device.

    Args:
        a: The first result: a tensor, or the leaves of a gradient.
        b: The second result.
        within: The difference that threads may make, in units of eps of the largest number: they
            change the order of sums.
    """
    pieces = [_pieces(each) for each in (a, b)]
    size = max((_largest(piece) for piece in pieces[0]), default=0.0)
    for one, other in zip(*pieces, strict=True):
        tolerance = within * torch.finfo(one.dtype).eps
        if not torch.allclose(one, other, tolerance, tolerance * size, equal_nan=True):
            return False
    return True


def _pieces(value: Tensor | list[Tensor]) -> list[Tensor]:
    leaves = [value] if isinstance(value, Tensor) else value
    return [piece for leaf in leaves for piece in torch.split(leaf.flatten(), PIECE)]


def _largest(piece: Tensor) -> float:
    finite = piece[piece.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def hidden_state() -> RefusedByAll:
    """Return the error for a loss with a state that cannot be handed from row to row."""
    return RefusedByAll(
        "Expected a loss that gives the same values when it is called again with the same "
        "arguments, found others: it keeps a state (a counter, an iterator, a generator, an array) "
        "where it is not found, so that all rows would see the same state. Keep it in a buffer, in "
        'an attribute of a module or in a list, or pass plan="loop" from the start, which calls '
        "the loss once for each row, in order."
    )
