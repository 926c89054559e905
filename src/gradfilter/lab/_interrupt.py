"""Ctrl-C and a polite kill as a question that a loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

POLITE = ("SIGTERM", "SIGHUP")
"""What a scheduler, ``kill`` and a closed terminal send; Windows knows the first."""


class Stop:
    """Whether this process was asked to stop; call it to ask.

    Attributes:
        number: The signal that asked first, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that such a signal ended: 130 after Ctrl-C."""
        return 128 + (signal.SIGINT if self.number is None else self.number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before. A polite kill may come twice, from a
                scheduler and from torchrun; whoever cannot wait has another one.
        """
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Give a question that is true once Ctrl-C was pressed, or a polite kill has come.

    A second Ctrl-C interrupts at once. What is ignored, as nohup asks for, stays ignored. Inside
    another one it is the same question: whoever asks outside learns of a signal that came too late
    for the loop inside.

    Examples:
        >>> with interruptible() as stopped:
        ...     stopped()
        False
    """
    # Only the main thread may handle signals; elsewhere they stay whatever they were.
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
