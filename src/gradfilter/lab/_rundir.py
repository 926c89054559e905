"""A run directory whose files are valid whenever the process is stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_bytes(content)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    write_bytes(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one line of JSON, in one system call so that no signal can cut it in two."""
    line = (json.dumps(_finite(value)) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        file.write(line)


def _finite(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not a number becomes null."""
    return {
        key: None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in value.items()
    }
