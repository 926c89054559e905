"""Turn Ctrl-C and SIGTERM into a flag that a loop checks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

POLITE = ("SIGTERM", "SIGHUP")
"""Signals of a scheduler, ``kill`` and a closed terminal; Windows has only the first."""


class Stop:
    """A flag that a signal sets; calling it returns whether to stop.

    Attributes:
        number: The first signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell reports for this signal: 130 after Ctrl-C."""
        return 128 + (signal.SIGINT if self.number is None else self.number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: A second Ctrl-C. A second SIGTERM is ignored: a scheduler and
                torchrun may both send one, and SIGKILL is always possible.
        """
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Yield a flag that is True once Ctrl-C was pressed, or SIGTERM has arrived.

    A second Ctrl-C interrupts immediately. Ignored signals, as under nohup, stay ignored. A nested
    call yields the same flag, so the outer loop sees a signal that came too late for the inner one.

    Examples:
        >>> with interruptible() as stopped:
        ...     stopped()
        False
    """
    # Only the main thread can handle signals; in other threads nothing is changed.
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    outside = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outside, Stop):
        yield outside
        return
    polite = [getattr(signal, name) for name in POLITE if hasattr(signal, name)]
    heard = [number for number in polite if signal.getsignal(number) is not signal.SIG_IGN]
    stop = Stop()
    before = {
        number: signal.signal(number, stop.handle) or signal.SIG_DFL
        for number in (signal.SIGINT, *heard)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
