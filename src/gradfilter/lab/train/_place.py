"""Where a run is kept: a directory that its settings name, owned by one process at a time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradfilter.lab._reading import ForeignError, read_json
from gradfilter.lab._rundir import refuse_link
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._config import PLACE, WATCHING, TrainConfig, setting
from gradfilter.lab.train._stored import check_types

LOCK = "run.lock"
LONGEST = 120
"""Characters of a folder's name, where file systems allow 255 bytes."""
MOST = 200
"""Characters of a folder that is named by one setting."""
MOST_BYTES = 250
"""Of either, however many a character has."""


def place_of(config: TrainConfig) -> Path:
    """``SAVE_DIR/[NAME/]MODEL/DATA/SETTING/[noise-0.2000-]seed-S``.

    SETTING joins the settings that are not the defaults by hyphens; ``default`` if there are none.
    """
    parts = [
        name.replace("_", "-") if value is True else f"{name.replace('_', '-')}-{_plain(value)}"
        for name, value in setting(config).items()
    ]
    long = _short("-".join(parts) or "default", LONGEST)
    noise = f"noise-{config.label_noise:.4f}-" if config.label_noise else ""
    model, data = (_short(_plain(name), MOST) for name in (config.model, config.data))
    return config.save_dir / config.name / model / data / long / f"{noise}seed-{config.seed}"


def _short(name: str, longest: int) -> str:
    """A name that differs from others also where it is cut."""
    coded = os.fsencode(name)
    if len(name) <= longest and len(coded) <= MOST_BYTES:
        return name
    start = coded[:LONGEST].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(coded).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    """A value as part of a file name."""
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        text = "-".join(_plain(part) for part in value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


class BusyError(UsageError):
    """Another process is at work where this one wanted to be."""


@contextmanager
def owned(place: Path) -> Iterator[None]:
    """Make the directory and keep other processes out of it; a killed one leaves no lock behind.

    Raises:
        BusyError: Another process is at work there.
    """
    try:
        new = [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True, exist_ok=True)
        refuse_link(place / LOCK)  # older file locks empty what it leads to
        with FileLock(place / LOCK, timeout=0):
            try:
                yield
            finally:
                _tidy(place, new)
    except Timeout:
        raise BusyError(
            f"the run in {str(place)!r} is at work in another process. "
            "Wait for it, or give this one another --name or --seed."
        ) from None


def _tidy(place: Path, new: list[Path]) -> None:
    """Take back the directories that were made for a run of which nothing was written."""
    if new and {path.name for path in place.iterdir()} <= {LOCK}:
        with suppress(OSError):  # somebody else is there meanwhile
            (place / LOCK).unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    Raises:
        UsageError: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {str(place)!r}: {error.strerror or error}. What was finished before "
            "is whole; make room or name another --save-dir, and --resume."
        ) from None


def is_finished(place: Path) -> bool:
    """Whether there is a run that was trained to its end."""
    exists = (place / "config.json").exists()
    return exists and read_config(place).get("status") == "finished"


def refuse_what_is_there(config: TrainConfig, place: Path) -> None:
    """Refuse to write over a run, and to go on with another one than was begun.

    Raises:
        UsageError: There is one.
    """
    if not (place / "config.json").exists():
        return
    found = read_config(place)
    if not config.resume:
        raise UsageError(
            f"there is a run in {str(place)!r} ({found.get('status')}). Go on with --resume, or "
            "give this one another --name or --seed."
        )
    own = plain_settings(config)
    others = [
        name
        for name in own
        if name not in (*PLACE, *WATCHING) and found["settings"].get(name) != own[name]
    ]
    if others:
        raise UsageError(
            f"--resume: the run in {str(place)!r} has other settings: {', '.join(others)}. "
            "Give this one another --name."
        )


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting, as JSON knows it."""
    return {name: _jsonable(value) for name, value in asdict(config).items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def read_config(place: Path) -> dict[str, Any]:
    """What ``config.json`` of a run says.

    Raises:
        UsageError: There is none, or it cannot be read.
    """
    path = place / "config.json"
    if not path.exists():
        raise UsageError(f"no run in {str(place)!r}: it has no config.json.")
    found = read_json(path, "the record of a run", "Look for it in another directory.", _record)
    if found.get("command") == "demo":
        raise UsageError(
            f"{str(place)!r} is of gradfilter demo, which drew its own curves.png; this command is "
            "for runs of gradfilter train."
        )
    return found


def _record(found: Any) -> dict[str, Any]:
    if isinstance(found, dict) and found.get("command") == "demo":
        return found
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ForeignError("it is not the record of a run")
    if found.get("command") == "train":
        check_types(found["settings"])
    return found


def find_runs(save_dir: Path, **wanted: Any) -> list[Path]:
    """The run directories below a folder whose settings are those wanted.

    Args:
        save_dir: Searched as a whole.
        **wanted: Fields of `TrainConfig` and their values.
    """
    found = []
    for path in sorted(save_dir.rglob("config.json")):
        try:
            record = read_config(path.parent)
        except UsageError:
            continue  # something else, or half of something
        settings = record["settings"]
        if record.get("command") == "train" and all(
            settings.get(name) == value for name, value in wanted.items()
        ):
            found.append(path.parent)
    return found
