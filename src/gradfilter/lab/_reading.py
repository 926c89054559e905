"""Reading what a run left behind: whatever is wrong with a file becomes one line.

A file may be cut off, changed, of another program or hostile. What the readers of JSON, zip
archives and pickles raise of such has no common type and no complete list, so everything that is
made of a file's content belongs inside `reading`.
"""

from __future__ import annotations

import json
import stat
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gradfilter.lab._usage import UsageError

T = TypeVar("T")

DEEPEST = 32
"""Levels of lists and objects in JSON; what this package writes has at most 8."""
LARGEST = 2**31
"""Bytes of a file of JSON."""


class ForeignError(ValueError):
    """A file holds something else than this package writes; the message says what."""


@contextmanager
def reading(path: Path | str, what: str, fix: str) -> Iterator[None]:
    """Turn whatever is wrong with a file into one line: which file, what, and what to do.

    Args:
        path: The file, or how people know what is read.
        what: What it is to a user, such as ``"the record of a run"``.
        fix: What to do about it, as a sentence.

    Raises:
        UsageError: Anything was raised inside, except a `UsageError`, which says enough.

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
            f"{what} {str(path)!r} cannot be read: {why(error)}. {fix}".rstrip()
        ) from None


def read_json(path: Path, what: str, fix: str, build: Callable[[Any], T]) -> T:
    """What is made of a file of JSON.

    Args:
        path: The file.
        what: What it is to a user.
        fix: What to do if it is not that.
        build: Makes it of the JSON; may raise whatever it likes.

    Raises:
        UsageError: The file is missing, is not JSON, or nothing can be made of it.
    """
    with reading(path, what, fix):
        return build(json_of(content_of(path)))


def content_of(path: Path, largest: int = LARGEST) -> bytes:
    """What is in a regular file; another kind could wait for ever, or have no end.

    Args:
        path: The file.
        largest: More bytes are not read.
    """
    size = regular_size(path)
    if size > largest:
        raise ForeignError(f"it has {size} bytes, more than any such file")
    with path.open("rb") as file:
        return file.read(size)  # of what the system makes up, such as /proc, there may be no end


def regular_size(path: Path) -> int:
    """The bytes of a regular file.

    Raises:
        ForeignError: It is a directory, a pipe or a device.
        OSError: There is none, or it cannot be reached.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ForeignError("it is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ForeignError("it is not a regular file")
    return found.st_size


def json_of(content: bytes) -> Any:
    """JSON in UTF-8, at most `DEEPEST` levels deep so that whoever walks through it may recurse.

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
    """The lists and objects in a list or an object."""
    values = whole.values() if isinstance(whole, dict) else whole
    if isinstance(whole, dict | list):
        yield from (value for value in values if isinstance(value, dict | list))


def why(error: Exception) -> str:
    """What is wrong with a file, without a full stop.

    Args:
        error: That its reader raised.

    Examples:
        >>> why(IsADirectoryError(21, "Is a directory")), why(KeyError("step"))
        ('Is a directory', "it has no 'step'")
        >>> why(TypeError("'int' object is not subscriptable"))
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
    r"""Text for a terminal: control characters, which could move its cursor, are spelt out.

    Names of directories that are not UTF-8 are spelt out, too.

    Args:
        text: One line.

    Examples:
        >>> print(printable("a\x1b[2Jb ±\n"))
        a\x1b[2Jb ±\n
        >>> print(printable(b"caf\xe9".decode(errors="surrogateescape")))
        caf\xe9
    """
    return "".join(c if c.isprintable() else _spelt(c) for c in str(text))


def _spelt(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a name that is not UTF-8
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape").decode()
