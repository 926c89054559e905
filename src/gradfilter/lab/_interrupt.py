"""Ctrl-C as a question that a loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Asked:
    """What is called when Ctrl-C is pressed."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; a second one interrupts at once.

    Inside another one it is the same question: whoever asks outside learns of a Ctrl-C that came
    too late for the loop inside.

    Examples:
        >>> with interruptible() as stopped:
        ...     stopped()
        False
    """
    # Only the main thread may handle signals; elsewhere Ctrl-C stays whatever it was.
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event().is_set
        return
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, _Asked):
        yield before.event.is_set
        return
    asked = _Asked()
    signal.signal(signal.SIGINT, asked)
    try:
        yield asked.event.is_set
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
