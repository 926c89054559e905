"""Write and read the checkpoints of a run: one zip archive that stays intact after any kill.

Adding to a zip archive overwrites the directory at its end. A copy of that directory is kept in a
file next to the archive until the entry is written. After a kill, the next owner of the run
restores the copy, and the archive is as before. Removing the copy commits the new entry.
"""

from __future__ import annotations

import io
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter.lab._run_files import (
    ForeignError,
    content_of,
    error_text,
    open_own,
    reading,
    regular_size,
    sync_to_disk,
    write_bytes,
)
from gradfilter.lab._usage import UsageError

ARCHIVE = "checkpoints.zip"
LABELS = "labels.pt"
DIRECTORY = "the directory at its end"
LENGTHS = range(26, 30)
"""Position of the lengths of name and extra field, which end an entry's own header."""
CHUNK = 2**20
PATIENCE = 10.0
"""Time that a reader waits for an archive that is being written, in seconds."""
_ENTRY = re.compile(r"(\d+)-step-(\d+)-epoch-([\d.]+)\.pt", re.ASCII)
FOLDER = 0x10
"""The mark of an entry that is a folder."""
_COMPRESSED = (
    "is compressed, which gradfilter never does: a small file could fill the memory. Pack it again "
    "without compression, or train again."
)


@dataclass(frozen=True)
class Checkpoint:
    """One entry of the archive.

    Attributes:
        id: 0 is the start of the training, 1 the next saved checkpoint, ...
        step: Steps done.
        epoch: Epochs done.
    """

    id: int
    step: int
    epoch: float

    @property
    def entry(self) -> str:
        """Return the name of the entry in the archive."""
        return f"{self.id:05d}-step-{self.step}-epoch-{self.epoch:.6f}.pt"


def tensor_bytes(flat: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors so that ``torch.load(..., weights_only=True)`` reads them anywhere."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu() for name, tensor in flat.items()}, buffer)
    return buffer.getvalue()


def add(archive: Path, entry: str, content: bytes) -> None:
    """Add an entry, completely or not at all; an existing entry of that name is kept."""
    recover(archive)
    if not archive.exists():
        first = io.BytesIO()
        with zipfile.ZipFile(first, "w") as new:
            new.writestr(entry, content)
        write_bytes(archive, first.getvalue())
        return
    with _open_archive(archive) as old:
        if entry in old.namelist():
            return
        start = old.start_dir
    with archive.open("rb") as found:
        found.seek(start)
        write_bytes(_directory_copy(archive), start.to_bytes(8, "big") + found.read())
    try:
        with open_own(archive, "r+b") as file:
            with zipfile.ZipFile(file, "a") as grown:
                grown.writestr(entry, content)
            sync_to_disk(file)
    except BaseException:
        recover(archive)
        raise
    _directory_copy(archive).unlink()


def recover(archive: Path) -> None:
    """Undo a write that a kill interrupted; only the owner of the run may call this."""
    kept = _directory_copy(archive)
    if not kept.exists():
        return
    if not archive.exists():
        kept.unlink()
        return
    with reading(kept, "what a killed run kept", "Remove it if the archive reads without it."):
        start, directory = _directory(content_of(kept), regular_size(archive))
    with open_own(archive, "r+b") as file:
        file.truncate(start)
        file.seek(start)
        file.write(directory)
        sync_to_disk(file)
    kept.unlink()


def _directory(content: bytes, size: int) -> tuple[int, bytes]:
    """Return the position of an archive's directory, and the directory itself.

    Args:
        content: The copy that `add` keeps.
        size: Size of the archive, which has grown since.
    """
    start, directory = int.from_bytes(content[:8], "big"), content[8:]
    with zipfile.ZipFile(_TailOfFile(start, directory)) as alone:
        offsets = [info.header_offset for info in alone.infolist()]
        fits = alone.start_dir == start and min(offsets) == 0 and max(offsets) < start
    if not fits or start > size:
        raise ForeignError("it does not fit the archive")
    return start, directory


class _TailOfFile(io.BytesIO):
    """A file of which only the end is in memory; positions count from the start of the whole file.

    Args:
        start: Number of bytes before the content.
        content: The bytes from there to the end.
    """

    def __init__(self, start: int, content: bytes) -> None:
        super().__init__(content)
        self.start = start

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before = self.start if whence == io.SEEK_SET else 0
        return self.start + super().seek(offset - before, whence)

    @override
    def tell(self) -> int:
        return self.start + super().tell()


def keep_until(archive: Path, step: int) -> None:
    """Discard the checkpoints after a step: a run that resumes there repeats them."""
    recover(archive)
    late = {c.entry for c in checkpoints(archive) if c.step > step} if archive.exists() else set()
    if not late:
        return
    rest = io.BytesIO()
    with _open_archive(archive) as old, zipfile.ZipFile(rest, "w") as new:
        for name in old.namelist():
            if name not in late:
                new.writestr(name, _content(archive, old, name))
    write_bytes(archive, rest.getvalue())


def checkpoints(archive: Path) -> list[Checkpoint]:
    """List the checkpoints in order, without entries that a damaged directory misnames.

    Raises:
        UsageError: The archive is missing, or it cannot be read.
    """
    with _open_archive(archive) as opened, reading(archive, "the archive", "Train again."):
        there = [info.filename for info in opened.infolist() if _matches_directory(opened, info)]
        found = [_ENTRY.fullmatch(name) for name in there]
        saved = {m[0]: Checkpoint(int(m[1]), int(m[2]), float(m[3])) for m in found if m}
        # Readers find a checkpoint by the name that this package gives it.
        own = [checkpoint for name, checkpoint in saved.items() if checkpoint.entry == name]
    return sorted(own, key=lambda c: c.id)


def misnamed(archive: Path) -> list[str]:
    """List entries whose name or position differs from that in the archive's directory.

    Raises:
        UsageError: The archive is missing, or it cannot be read.
    """
    return _damaged_entries(archive, _matches_directory)


def damaged(archive: Path) -> list[str]:
    """List entries whose name or content has changed since it was written; reads everything.

    Raises:
        UsageError: The archive is missing, or it cannot be read.
    """
    return _damaged_entries(archive, _is_whole)


def _damaged_entries(
    archive: Path, is_fine: Callable[[zipfile.ZipFile, zipfile.ZipInfo], bool]
) -> list[str]:
    with _open_archive(archive) as opened:
        lost = [info.filename for info in opened.infolist() if not is_fine(opened, info)]
        return lost if _is_covered(archive, opened) else [*lost, DIRECTORY]


def newest_whole(archive: Path) -> Checkpoint | None:
    """Return the last undamaged checkpoint.

    Raises:
        UsageError: The archive is missing, or it cannot be read.
    """
    saved = checkpoints(archive)
    with _open_archive(archive) as opened:
        whole = (c for c in reversed(saved) if _is_whole(opened, opened.getinfo(c.entry)))
        return next(whole, None)


def advice_on_damage(archive: Path) -> str:
    """Return which checkpoint to use instead of a damaged one, as a sentence."""
    newest = newest_whole(archive)
    if newest is None:
        return "No checkpoint there is intact: train again."
    return f"The newest intact checkpoint is {newest.id}, after step {newest.step}."


def _matches_directory(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    """Return whether the entry has the position and the name that the directory says."""
    try:
        opened.open(info).close()
    except Exception:  # errors of zipfile for damaged bytes have no common type
        return False
    return True


def _is_covered(archive: Path, opened: zipfile.ZipFile) -> bool:
    """Return whether the entries are contiguous: then the directory omits none."""
    end = 0
    with archive.open("rb") as file:
        for info in sorted(opened.infolist(), key=lambda info: info.header_offset):
            if info.header_offset != end:
                return False
            file.seek(end + LENGTHS.start)
            lengths = file.read(len(LENGTHS))
            name, extra = (int.from_bytes(part, "little") for part in (lengths[:2], lengths[2:]))
            end += LENGTHS.stop + name + extra + info.compress_size
    return end == opened.start_dir


def _is_whole(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    """Return whether an entry matches its checksum."""
    if info.compress_type != zipfile.ZIP_STORED:  # it could also fill the memory
        return False
    try:
        with opened.open(info) as entry:
            while entry.read(CHUNK):
                pass
    except Exception:
        return False
    return True


def read_tensors(archive: Path, entry: Checkpoint | str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint or of another entry, without running pickled code.

    Raises:
        UsageError: The entry is missing, damaged, or not what this package wrote.
    """
    name = entry if isinstance(entry, str) else entry.entry
    with _open_archive(archive) as opened:
        content = _content(archive, opened, name)
    return tensors_of(content, f"checkpoint {name!r} in {str(archive)!r}")


def _content(archive: Path, opened: zipfile.ZipFile, name: str) -> bytes:
    """Read the bytes of an entry.

    Raises:
        UsageError: The entry is missing, damaged, or may be far larger than the archive.
    """
    what = f"checkpoint {name!r} in {str(archive)!r}"
    try:
        entry = opened.getinfo(name)
        content = opened.read(name) if entry.compress_type == zipfile.ZIP_STORED else None
    except KeyError:
        raise UsageError(f"{str(archive)!r} has no checkpoint {name!r}.") from None
    except Exception as error:  # errors of zipfile for damaged bytes have no common type
        raise UsageError(
            f"{what} is damaged: {error_text(error)}. {advice_on_damage(archive)}"
        ) from None
    if content is None:
        raise UsageError(f"{what} {_COMPRESSED}")
    return content


def tensors_of(
    content: bytes, what: str, fix: str = "Choose another, or train again."
) -> dict[str, Tensor]:
    """Read tensors by name, and nothing else, after checking their checksums.

    Every tensor has a checksum, which torch writes and does not check.

    Args:
        content: The bytes that `tensor_bytes` made.
        what: Its name in error messages.
        fix: Advice in error messages if it is damaged.

    Raises:
        UsageError: It is damaged or holds something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as inside:
            entries = inside.infolist()
            inflates = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            # The sizes of overlapping entries sum to more than the file.
            overlaps = sum(entry.file_size for entry in entries) > len(content)
            # A forged size could make the read arbitrarily long.
            flipped = not (inflates or overlaps) and inside.testzip() is not None
        # torch checks no checksums, and reads an entry marked as a folder as empty.
        damaged = flipped or overlaps or any(entry.external_attr & FOLDER for entry in entries)
        read = None if inflates or damaged else _loaded(content)
    except UnpicklingError:
        raise UsageError(
            f"{what} holds more than tensors, and was not opened: loading it could run any code. "
            "Use a file that this program wrote."
        ) from None
    except Exception:  # errors of torch for damaged bytes have no common type
        raise UsageError(f"{what} is damaged. {fix}".rstrip()) from None
    if inflates:
        raise UsageError(f"{what} {_COMPRESSED}")
    if damaged:
        raise UsageError(f"{what} is damaged. {fix}".rstrip())
    if not isinstance(read, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
        for name, value in read.items()
    ):
        raise UsageError(f"{what} is not a dict of tensors. Use a file that this program wrote.")
    return dict(read)


def _loaded(content: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that torch did not write
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether every entry of a tensor has its own number in memory.

    An expanded, sparse or meta tensor may have any size without that.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _open_archive(archive: Path) -> zipfile.ZipFile:
    if not archive.exists():
        raise UsageError(f"no checkpoints: {str(archive)!r} does not exist. Train first.")
    with reading(archive, "the archive", "Train again."):
        regular_size(archive)
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(Exception):  # it may be being written just now
            if not _directory_copy(archive).exists():
                return zipfile.ZipFile(archive)
        if time.monotonic() > deadline or not _directory_copy(archive).exists():
            break
        time.sleep(0.05)
    if _directory_copy(archive).exists():
        raise UsageError(
            f"{str(archive)!r} was left half-written by a killed run. "
            "Continue the run with --resume, which recovers it."
        )
    with reading(archive, "the archive", "Train again."):
        return zipfile.ZipFile(archive)


def _directory_copy(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.directory")
