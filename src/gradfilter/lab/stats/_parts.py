"""Finished batches on disk, one line each, so that a killed measurement goes on where it was."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradfilter.lab._reading import ForeignError, content_of, json_of, reading
from gradfilter.lab._rundir import open_own
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._origin import modern
from gradfilter.lab.stats._place import explained
from gradfilter.lab.stats._records import Record, flat


def part_path(folder: Path, stem: str, rank: int) -> Path:
    """Where a process keeps its finished batches."""
    return folder / f"{stem}-id-{rank}.jsonl"


def parts(folder: Path, stem: str) -> list[Path]:
    """The parts that there are, also those of more processes than there are now."""
    return sorted(
        path
        for path in folder.glob(f"{glob.escape(stem)}-id-*.jsonl")
        if path.name.removeprefix(f"{stem}-id-").removesuffix(".jsonl").isdecimal()
    )


def finished(path: Path, origin: Mapping[str, Any]) -> list[Record]:
    """The batches in a part.

    A killed process may leave half of a last line; it does not count.

    Args:
        path: Of the part.
        origin: What the numbers depend on.

    Raises:
        UsageError: They depend on something else.
    """
    with reading(path, "the part of a measurement", "Remove it, and measure again."):
        whole = _whole(path)
        if not whole:
            return []
        head, *rest = map(json_of, whole.removesuffix(b"\n").split(b"\n"))
        if not isinstance(head, dict):
            raise ForeignError("its first line does not say what was measured")
        before = modern(head)
        records = [Record.of(line) for line in rest]
    if before.get("axes") == ["sample"]:
        records = [replace(record, stats=flat(record.stats)) for record in records]
    if before != origin:
        differing = sorted(
            name for name in {*before, *origin} if before.get(name) != origin.get(name)
        )
        raise UsageError(
            f"{str(path)!r} is part of a measurement with other {', '.join(differing)}. Finish "
            "that one, remove the file, or give --outname."
        )
    return records


def _whole(path: Path) -> bytes:
    """The file up to its last end of line."""
    content = content_of(path)
    return content[: content.rfind(b"\n") + 1]


@contextmanager
def appending(path: Path, origin: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """Open a part, and give the function that adds a finished batch to it.

    Raises:
        UsageError: It cannot be written; also by that function.
    """
    with ExitStack() as stack:
        with explained(path):
            keep = len(_whole(path)) if path.exists() else 0
            file = stack.enter_context(open_own(path, "ab", buffering=0))
            file.truncate(keep)

        def line(value: Mapping[str, Any]) -> None:
            rest = (json.dumps(value, allow_nan=False) + "\n").encode()
            with explained(path):
                while rest:  # a disk that is nearly full takes a part, and then refuses
                    rest = rest[file.write(rest) :]

        if not keep:
            line(origin)
        yield lambda record: line(record.plain())
