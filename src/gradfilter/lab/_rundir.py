"""A run directory whose files are valid whenever the process is stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gradfilter.lab._usage import UsageError


def named_directory(path: Path) -> Path:
    """Make the directory that the user named: new or empty, for the results are looked for there.

    Raises:
        UsageError: It is a file, has something in it, or cannot be written to.
    """
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UsageError(
                f"--out: expected a new or empty directory, found files in {str(path)!r}. "
                "Results of two runs are not mixed: name another, or leave --out away."
            )
        _probe(path)
    return path


def numbered_directory(path: Path) -> Path:
    """Make a directory that was not there before: ``path``, or ``path-2``, ``path-3``, ...

    Raises:
        UsageError: It cannot be written to.
    """
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with _explained(candidate), suppress(FileExistsError):
            candidate.mkdir(parents=True)  # fails if another process was faster
            _probe(candidate)
            return candidate
    raise AssertionError  # the numbers do not end


def _probe(path: Path) -> None:
    write_bytes(path / "probe", b"")
    (path / "probe").unlink()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--out: cannot write to the directory {str(path)!r}: {error.strerror}. Name another."
        ) from None


def write_bytes(path: Path, content: bytes, *, before: Path | None = None) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: The file.
        content: What is in it afterwards.
        before: Where the file that was there is kept. Whoever is killed between two moments leaves
            that one alone, and no file at `path`.
    """
    half = path.with_name(f".{path.name}.part")
    half.unlink(missing_ok=True)  # of a killed process, or a link that somebody planted
    try:
        with open_own(half, "xb") as file:
            file.write(content)
            settle(file)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    write_bytes(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line of JSON as a whole, or leave the file as it was."""
    append_line(path, json.dumps(_finite(value)))


def append_line(path: Path, line: str) -> None:
    """Append one line as a whole, or leave the file as it was.

    A disk that is nearly full, a quota or a limit on the size of files takes a part of what is
    written, and refuses the rest.

    Raises:
        OSError: The line was not written.
    """
    rest = f"{line}\n".encode()
    # Without a buffer: it is one system call, and nothing is left to be written after a failure.
    with open_own(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
            settle(file)
        except BaseException:
            os.ftruncate(file.fileno(), before)
            raise


@contextmanager
def open_own(path: Path, mode: str, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a file of a run for writing: a file of its own, and nothing that a link leads to.

    Directories that come from elsewhere may hold links in the places of a run's files; whoever
    writes through one destroys what it points to.

    Args:
        path: The file.
        mode: As `open` has it, for bytes.
        buffering: As `open` has it.

    Raises:
        OSError: The file cannot be opened.
        UsageError: There is a link, or something else that is not a file.
    """
    refuse_link(path)
    with open(path, mode, buffering, opener=_no_link) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _foreign(path, "not a file")
        yield file


def refuse_link(path: Path) -> None:
    """Refuse a link in the place of a file that is about to be written.

    Raises:
        UsageError: There is one.
    """
    if path.is_symlink():
        raise _foreign(path, "a symbolic link")


def _no_link(path: str, flags: int) -> int:
    """Open without following a link that was planted a moment ago, or waiting at a pipe."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def _foreign(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} is {what}, and what it leads to is not written to. Remove it, or put a "
        "file in its place."
    )


def settle(file: IO[bytes]) -> None:
    """Wait until the disk has what was written: some refuse it as late as then."""
    file.flush()
    os.fsync(file.fileno())


def _finite(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not a number becomes null."""
    return {
        key: None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in value.items()
    }
