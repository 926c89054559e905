"""What a forward pass over all rows does to its buffers, and whether that can be made up for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gradfilter._types import Tree


class BufferWatch:
    """Follows buffers, known by identity, through one forward pass.

    All rows run at once, so a buffer cannot be handed from row to row. BatchNorm's running
    statistics and counters are made up for afterwards; every other write is refused, and so is
    every other use of statistics that were written.
    """

    def __init__(self, buffers: Tree) -> None:
        """Watch the given tensors."""
        self._buffers = buffers
        self._names = {id(b): name for name, b in buffers.items()}
        self._versions = {name: b._version for name, b in buffers.items()}
        self._used: set[str] = set()

    def name(self, value: Any) -> str | None:
        """The name of the buffer that a value is."""
        return self._names.get(id(value))

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which buffers a function is given, and refuse writes that leave no trace."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # asking a tensor for its shape is no use of its values
            return
        listed = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]
        found = {self.name(x) for x in (*args, *listed)} - {None}
        written = self.name(kwargs.get("out"))
        if written is not None:
            raise Unreplayable(written, f"as out= of {name}")
        self._used |= {str(buffer) for buffer in found}
        if name.startswith("_foreach") and found:  # raises no version
            raise Unreplayable(str(found.pop()), f"by {name}")

    def read(self, *buffers: str) -> None:
        """Note that running statistics were read."""
        self._used |= set(buffers)

    def check(self, after: Tree, updated: set[str], handed: Collection[str] = ()) -> None:
        """Refuse what cannot be made up for.

        Args:
            after: The buffers after the forward pass.
            updated: The running statistics that were due an update.
            handed: Buffers that were handed from row to row.
        """
        for name, buffer in self._buffers.items():
            if name in handed:
                continue
            counts = name.endswith("num_batches_tracked")
            if not counts and after[name] is not buffer:
                raise Unreplayable(name, "by assignment")
            if not counts and buffer._version != self._versions[name]:
                raise Unreplayable(name, "in place")
        for name in sorted(self._used & updated.union(handed)):
            raise Unreplayable(name, "and also reads")


class Unreplayable(RuntimeError):
    """A buffer stops rows from running at once.

    Attributes:
        buffer: Its name.
    """

    def __init__(self, buffer: str, how: str) -> None:
        super().__init__(
            f"A pass over all rows at once cannot hand buffer {buffer!r}, which the forward pass "
            f'writes {how}, from row to row. Use plan="loop".'
        )
        self.buffer = buffer
