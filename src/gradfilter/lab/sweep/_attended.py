"""A worker that another process started: it does not outlive that one."""

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
    """Press Ctrl-C in this process as soon as nobody holds the other end of a pipe.

    Args:
        pipe: File descriptor of this end.
    """
    # Not sys.stdin: a daemon that waits in its lock is a fault when the process ends.
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
