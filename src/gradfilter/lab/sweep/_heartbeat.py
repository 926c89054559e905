"""Signs of life of the worker that trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.storages import RDBStorage

from gradfilter.lab.sweep._storage import FAULTS

log = logging.getLogger("gradfilter.sweep")


@contextmanager
def beating(rdb: RDBStorage, trial_id: int, seconds: float) -> Iterator[None]:
    """Tell the storage every so many seconds that a trial is alive; it was told just before."""
    over = threading.Event()

    def beat() -> None:
        try:
            while not over.wait(seconds):
                try:
                    rdb.record_heartbeat(trial_id)
                except FAULTS as error:
                    # A storage that is away for a while costs at most a takeover, which the lock
                    # of the run directory stops.
                    log.warning("no heartbeat: %s", error)
        finally:
            rdb.remove_session()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
