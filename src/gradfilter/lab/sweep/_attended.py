"""End a worker when the process that started it ends."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from typing import Never

from gradfilter.lab._cli import main
from gradfilter.lab.sweep._workers import AGAIN


def follow(pipe: int) -> Never:
    """Interrupt this process as soon as the other end of a pipe is closed.

    Args:
        pipe: File descriptor of this process's end.
    """
    # Not sys.stdin: a daemon thread that waits for its lock aborts the exit of the process.
    while os.read(pipe, 1):
        pass
    while True:
        if sys.platform == "win32":
            _thread.interrupt_main()
        else:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(AGAIN)


if __name__ == "__main__":
    threading.Thread(target=follow, args=(sys.stdin.fileno(),), daemon=True).start()
    main(["sweep", *sys.argv[1:]])
