"""The folder of a run's numbers: who may write there, and what is said when nobody can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gradfilter.lab._crew import Crew
from gradfilter.lab._rundir import refuse_link
from gradfilter.lab._usage import UsageError


@contextmanager
def locked(path: Path, crew: Crew) -> Iterator[None]:
    """Keep other commands away from a file of numbers; a killed one leaves no lock behind.

    Args:
        path: The file that is going to be written.
        crew: Who works on it together.

    Raises:
        UsageError: Another command is at work on it, or its folder cannot be written to.
    """
    lock_path = path.with_name(f".{path.stem}.lock")
    lock = FileLock(lock_path, timeout=0)
    refusal = ""
    if crew.is_first:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(lock_path)  # older file locks empty what it leads to
            lock.acquire()
        except Timeout:
            refusal = "another process is measuring the same. Wait for it, or give --outname"
        except OSError as error:
            refusal = f"it cannot be written: {error.strerror or error}. Mend that, and repeat"
    try:
        # Of several processes only the first one knows why, and it is the one that is heard.
        if crew.together(lambda: bool(refusal))():
            raise UsageError(f"{str(path)!r}: {refusal}.")
        yield
    finally:
        if lock.is_locked:
            # Whoever finds it later would wonder; who opened it just now sees that it is gone.
            with suppress(OSError):
                lock_path.unlink()
        lock.release()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    Raises:
        UsageError: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. The batches that were "
            "finished are kept; mend that, and the same command goes on."
        ) from None
