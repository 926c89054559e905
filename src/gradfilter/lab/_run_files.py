"""Read and write the files of a run directory.

A file may be cut, changed, hostile, or written by another program. Errors of readers of JSON,
zip archives and pickles have no common type and no complete list. So all use of a file's content
belongs inside `reading`, which turns every error into one line. Written files are valid whenever
the process stops.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from gradfilter.lab._usage import UsageError

# --- Reading ---


T = TypeVar("T")

DEEPEST = 32
"""Largest depth of lists and objects in JSON; this package writes at most 8 levels."""
LARGEST = 2**31
"""Largest number of bytes in a JSON file."""


class ForeignError(ValueError):
    """A file has content that this package does not write; the message says which."""


@contextmanager
def reading(path: Path | str, what: str, fix: str) -> Iterator[None]:
    """Turn any error of reading a file into one line: which file, the error, and the fix.

    Args:
        path: The file, or another name of the content for people.
        what: The kind of file, such as ``"the record of a run"``.
        fix: Advice for the user, as a sentence.

    Raises:
        UsageError: Any exception was raised inside. A `UsageError` is passed on unchanged.

    Examples:
        >>> with reading(Path("a.json"), "the record", "Train again."):
        ...     json_of(b"[1, 2")
        Traceback (most recent call last):
            ...
        gradfilter.lab._usage.UsageError: the record 'a.json' cannot be read: it is not JSON \
(Expecting ',' delimiter: line 1 column 6 (char 5)). Train again.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{what} {str(path)!r} cannot be read: {error_text(error)}. {fix}".rstrip()
        ) from None


def read_json(path: Path, what: str, fix: str, build: Callable[[Any], T]) -> T:
    """Read a JSON file, and convert it.

    Args:
        path: The file.
        what: The kind of file, for error messages.
        fix: Advice for the user, for error messages.
        build: Converts the JSON; may raise any exception.

    Raises:
        UsageError: The file is missing, is not JSON, or cannot be converted.
    """
    with reading(path, what, fix):
        return build(json_of(content_of(path)))


def content_of(path: Path, largest: int = LARGEST) -> bytes:
    """Read a regular file; a pipe could block forever, and a device could have no end.

    Args:
        path: The file.
        largest: Largest number of bytes; a larger file is refused.
    """
    size = regular_size(path)
    if size > largest:
        raise ForeignError(f"it has {size} bytes, more than any such file")
    with path.open("rb") as file:
        return file.read(size)  # generated files, as in /proc, may have no end


def regular_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        ForeignError: It is a directory, a pipe or a device.
        OSError: The file is missing, or it cannot be reached.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ForeignError("it is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ForeignError("it is not a regular file")
    return found.st_size


def json_of(content: bytes) -> Any:
    """Parse JSON in UTF-8, at most `DEEPEST` levels deep, so that callers may recurse.

    Examples:
        >>> json_of(b'{"a": [1, null]}')
        {'a': [1, None]}
    """
    found = json.loads(content.decode())
    level = [found]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return found
    raise RecursionError


def _parts(whole: Any) -> Iterator[Any]:
    """Yield the lists and objects in a list or an object."""
    values = whole.values() if isinstance(whole, dict) else whole
    if isinstance(whole, dict | list):
        yield from (value for value in values if isinstance(value, dict | list))


def error_text(error: Exception) -> str:
    """Describe an error of a file, without a full stop.

    Args:
        error: The exception that its reader raised.

    Examples:
        >>> error_text(IsADirectoryError(21, "Is a directory")), error_text(KeyError("step"))
        ('Is a directory', "it has no 'step'")
        >>> error_text(TypeError("'int' object is not subscriptable"))
        "it is not what gradfilter writes (TypeError: 'int' object is not subscriptable)"
    """
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:200]
    match error:
        case ForeignError() | tomllib.TOMLDecodeError():
            return said
        case UnicodeDecodeError():
            return f"it is not UTF-8 text (byte {error.start})"
        case json.JSONDecodeError():
            return f"it is not JSON ({said})"
        case RecursionError():
            return "its brackets are nested too deeply"
        case zipfile.BadZipFile():
            return f"it is not a zip archive, or is damaged ({said})"
        case KeyError():
            return f"it has no {said}"
        case OSError():
            return error.strerror or said or type(error).__name__
        case MemoryError():
            return "it asks for more memory than there is"
    return f"it is not what gradfilter writes ({type(error).__name__}: {said})"


def printable(text: object) -> str:
    r"""Escape control characters, which could move the cursor of a terminal.

    Bytes of names that are not UTF-8 are also escaped.

    Args:
        text: One line of text.

    Examples:
        >>> print(printable("a\x1b[2Jb ±\n"))
        a\x1b[2Jb ±\n
        >>> print(printable(b"caf\xe9".decode(errors="surrogateescape")))
        caf\xe9
    """
    return "".join(c if c.isprintable() else _spelt(c) for c in str(text))


def _spelt(character: str) -> str:
    byte = ord(character) - 0xDC00  # a byte of a name that is not UTF-8
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape").decode()


# --- Writing ---


def named_directory(path: Path) -> Path:
    """Make the directory that the user named, which must be new or empty.

    Raises:
        UsageError: It is a file, is not empty, or cannot be written to.
    """
    with _file_errors_as_usage(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UsageError(
                f"--out: expected a new or empty directory, found files in {str(path)!r}. "
                "Results of two runs are not mixed: name another, or omit --out."
            )
        _probe(path)
    return path


def numbered_directory(path: Path) -> Path:
    """Make a new directory: ``path``, or ``path-2``, ``path-3``, ...

    Raises:
        UsageError: The directory cannot be written to.
    """
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with _file_errors_as_usage(candidate), suppress(FileExistsError):
            candidate.mkdir(parents=True)  # fails if another process was faster
            _probe(candidate)
            return candidate
    raise AssertionError  # the loop does not end


def _probe(path: Path) -> None:
    write_bytes(path / "probe", b"")
    (path / "probe").unlink()


@contextmanager
def _file_errors_as_usage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--out: cannot write to the directory {str(path)!r}: {error.strerror}. Name another."
        ) from None


def write_bytes(path: Path, content: bytes, *, before: Path | None = None) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file.
        content: New content of the file.
        before: Path to which the old file is moved. A kill between both renames leaves the old file
            there, and no file at `path`.
    """
    half = path.with_name(f".{path.name}.part")
    half.unlink(missing_ok=True)  # left by a killed process, or a planted link
    try:
        with open_own(half, "xb") as file:
            file.write(content)
            sync_to_disk(file)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all."""
    write_bytes(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line of JSON completely, or do not change the file."""
    append_line(path, json.dumps(_finite(value)))


def append_line(path: Path, line: str) -> None:
    """Append one line completely, or do not change the file.

    A nearly full disk, a quota or a limit on the size of files may accept only a part of the line.

    Raises:
        OSError: The line was not written.
    """
    rest = f"{line}\n".encode()
    # Without a buffer it is one system call, and no data is left to write after a failure.
    with open_own(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
            sync_to_disk(file)
        except BaseException:
            os.ftruncate(file.fileno(), before)
            raise


@contextmanager
def open_own(path: Path, mode: str, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a file of a run for writing, without following links.

    A directory from another source may contain links instead of a run's files. Writing through a
    link would destroy its target.

    Args:
        path: The file.
        mode: Binary mode of `open`.
        buffering: Buffering of `open`.

    Raises:
        OSError: The file cannot be opened.
        UsageError: The path is a link, or not a regular file.
    """
    refuse_link(path)
    with open(path, mode, buffering, opener=_open_without_link) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _foreign(path, "not a file")
        yield file


def refuse_link(path: Path) -> None:
    """Refuse a link at the path of a file to write.

    Raises:
        UsageError: The path is a link.
    """
    if path.is_symlink():
        raise _foreign(path, "a symbolic link")


def _open_without_link(path: str, flags: int) -> int:
    """Open without following a link that was just planted, and without blocking on a pipe."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def _foreign(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} is {what}, and its target is not written to. Remove it, or replace it "
        "by a file."
    )


def sync_to_disk(file: IO[bytes]) -> None:
    """Wait until the data is on disk; some file systems report errors only then."""
    file.flush()
    os.fsync(file.fileno())


def _finite(value: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities by null, because JSON has neither."""
    return {
        key: None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in value.items()
    }
