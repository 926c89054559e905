"""Random generators on the host that torch knows nothing of: Python's, NumPy's, the modules' own.

Wav2Vec2 and Whisper, for example, draw their masks with NumPy. A draw on the host is one value for
all rows of a pass, and a pass that is run again has to draw it again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

Generator = tuple[str, Callable[[], Any], Callable[[Any], None]]
"""What to call it in an error; how to read and how to set its state."""


class HostRandom:
    """The states of the generators at one moment.

    Args:
        own: Generators in attributes of modules, by name.
        everywhere: Python's and NumPy's generators, which anybody may draw from, too.
    """

    def __init__(self, own: Iterable[tuple[str, Any]], *, everywhere: bool = True) -> None:
        self._generators = [
            *(_global() if everywhere else ()),
            *(_accessors(name, generator) for name, generator in own),
        ]
        self._states = [get() for _, get, _ in self._generators]

    def present(self) -> HostRandom:
        """The states of the same generators now."""
        found = object.__new__(HostRandom)
        found._generators = self._generators
        found._states = [get() for _, get, _ in self._generators]
        return found

    def restore(self) -> None:
        """Set every generator back to its state at that moment."""
        for (_, _, put), state in zip(self._generators, self._states, strict=True):
            put(state)

    def moved(self) -> str | None:
        """The name of a generator that has drawn since; torch's own are left out.

        Those draw for every row, also in a pass over all rows at once.
        """
        for (name, get, _), state in zip(self._generators, self._states, strict=True):
            if not isinstance(state, torch.Tensor) and not _equal(get(), state):
                return str(name)
        return None


def _global() -> list[Generator]:
    found: list[Generator] = [("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing with it
    if numpy is not None:
        found.append(("numpy.random", numpy.random.get_state, numpy.random.set_state))
    return found


def _accessors(name: str, generator: Any) -> Generator:
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator

        def put(state: Any) -> None:
            bits.state = state

        return name, lambda: bits.state, put
    if hasattr(generator, "getstate"):
        return name, generator.getstate, generator.setstate
    return name, generator.get_state, generator.set_state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, tuple) and any(hasattr(item, "tobytes") for item in a):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
