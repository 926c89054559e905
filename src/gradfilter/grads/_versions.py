"""Whether tensors that a pass read have been written since."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor


class Versions:
    """Tensors, and how often each had been written in place at one moment.

    Args:
        tensors: Each with what to call it in an error.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors of inference mode count nothing.
        self._noted = [(n, t, t._version) for n, t in tensors if not t.is_inference()]

    def written(self) -> str | None:
        """What to call a tensor that has been written since, or None."""
        return next((n for n, t, version in self._noted if t._version != version), None)

    def check(self, names: Collection[str] | None = None) -> None:
        """Refuse to compute with tensors that have been written since.

        Args:
            names: Only those called so; None for all.
        """
        for name, tensor, version in self._noted:
            if tensor._version != version and (names is None or name in names):
                raise RuntimeError(
                    f"Expected the tensors of a stack as they were when it was computed, found the "
                    f"{name} written in place since. This question needs another pass over the "
                    "batch: ask it before writing, or compute the stack from clones."
                )
