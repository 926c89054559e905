"""Open the storage of a study: one writer at a time, and the heartbeat of its workers."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from gradfilter.lab._run_files import refuse_link
from gradfilter.lab._usage import UsageError

# --- The storage ---


FAULTS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
"""Errors of a storage that is out of reach."""
UNREACHED = (sqlite3.OperationalError, sqlite3.InterfaceError)
PATIENCE = 60
"""Time that a writer waits for other writers of the same file, in seconds."""
ATTEMPTS = 3
AGAIN = "Move it away; the same command rebuilds it from the existing runs."


@dataclass(frozen=True)
class Storage:
    """The database of a study.

    Attributes:
        rdb: The storage in optuna.
        file: Its file, or None for a server.
        shown: Its name without the password.
    """

    rdb: RDBStorage
    file: Path | None
    shown: str

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the queue, so that one worker at a time changes it; the lock ends with the process.

        SQLite cannot lock a row for reading, and optuna reads and writes in two steps there, so a
        file is locked. On a server, the lock is the one row of a table that optuna writes only
        when it migrates.
        """
        if self.file is not None:
            with _lock(self.file):
                yield
            return
        with self.rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT * FROM version_info FOR UPDATE"))
            yield

    def close(self) -> None:
        """Close the connections."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()


def opened(where: str, heartbeat: int) -> Storage:
    """Open a storage; a file that does not exist is created.

    Args:
        where: A file or the URL of a database.
        heartbeat: Heartbeat interval in seconds.

    Raises:
        UsageError: The storage cannot be reached, or is not the storage of a study.
    """
    shown = where
    try:
        url = sqlalchemy.make_url(where if "://" in where else _url(Path(where)))
        shown = url.render_as_string() if "://" in where else where  # without the password
        if url.get_backend_name() != "sqlite":
            return Storage(_attempted(url, heartbeat), None, shown)
        if url.database in (None, "", ":memory:"):
            raise UsageError(f"--storage: {shown!r} is lost when the process ends. Name a file.")
        file = Path(str(url.database))
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):  # two processes must not create the same tables at once
            storage = Storage(_rdb(url, heartbeat), file, shown)
            _check_pages(storage)
            return storage
    except UnicodeEncodeError:
        raise UsageError(
            f"--storage: expected a path in UTF-8, found {shown!r}. Name another file."
        ) from None
    except ImportError as error:
        raise UsageError(f"--storage: {shown!r} needs a driver: {_line(error)}") from None
    except UsageError:
        raise
    except Exception as error:  # errors of damaged tables have no common type
        fix = f" {AGAIN}" if _is_damage(error) else ""
        raise UsageError(f"--storage: {shown!r} cannot be used: {_line(error)}{fix}") from None


@contextmanager
def storage_errors_as_usage() -> Iterator[None]:
    """Turn errors of a storage that was reached before into one line.

    Raises:
        UsageError: The storage is out of reach.
    """
    try:
        yield
    except FAULTS as error:
        raise UsageError(
            f"--storage: out of reach: {_line(error)} Finished trainings are kept; repeat the "
            "command to continue."
        ) from None


def _attempted(url: sqlalchemy.URL, heartbeat: int) -> RDBStorage:
    """Connect, and retry: several workers may create the same tables on a server at once."""
    for _ in range(ATTEMPTS - 1):
        try:
            return _rdb(url, heartbeat)
        except FAULTS:
            time.sleep(0.5)
    return _rdb(url, heartbeat)


def _rdb(url: sqlalchemy.URL, heartbeat: int) -> RDBStorage:
    sqlite = url.get_backend_name() == "sqlite"
    template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    with warnings.catch_warnings():
        # Heartbeats are experimental in optuna; the tests cover the installed version.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            template,  # which optuna fills in
            # A server closes a connection that is idle for as long as a training takes.
            engine_kwargs={"connect_args": {"timeout": PATIENCE}}
            if sqlite
            else {"pool_pre_ping": True},
            heartbeat_interval=heartbeat,
        )


def _check_pages(storage: Storage) -> None:
    """Refuse a file whose tables and indices contradict each other: rows may be lost in it."""
    with storage.rdb.engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("PRAGMA integrity_check")).scalar()
    if found != "ok":
        storage.close()
        what = str(found).splitlines()[-1]
        raise UsageError(f"--storage: {storage.shown!r} is damaged: {what}. {AGAIN}")


def _url(file: Path) -> str:
    url = sqlalchemy.URL.create("sqlite", database=str(file))
    return url.render_as_string(hide_password=False)


def _lock(file: Path) -> FileLock:
    path = file.with_name(f"{file.name}.lock")
    refuse_link(path)  # older versions of filelock empty the target of a link
    return FileLock(path, poll_interval=0.01)


def _is_damage(error: BaseException) -> bool:
    """Return whether the file itself is damaged, and not merely unreachable."""
    while error.__cause__ is not None:
        error = error.__cause__
    own = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, UNREACHED)
    return own or isinstance(error, UnicodeDecodeError)


def _line(error: BaseException) -> str:
    """Return the innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    told = str(error).strip().splitlines() or [type(error).__name__]
    return f"{told[0].rstrip('.')}."


# --- The heartbeat of a worker ---


log = logging.getLogger("gradfilter.sweep")


@contextmanager
def heartbeats(rdb: RDBStorage, trial_id: int, seconds: float) -> Iterator[None]:
    """Record a heartbeat of a trial every `seconds` seconds; the first was just recorded."""
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(rdb, trial_id, seconds, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beat(rdb: RDBStorage, trial_id: int, seconds: float, over: threading.Event) -> None:
    """Record heartbeats until the event."""
    try:
        while not over.wait(seconds):
            try:
                rdb.record_heartbeat(trial_id)
            except FAULTS as error:
                # A storage that is briefly out of reach causes at most a takeover, which the
                # lock of the run directory refuses.
                log.warning("no heartbeat: %s", error)
    finally:
        rdb.remove_session()
