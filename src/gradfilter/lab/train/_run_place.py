"""The run directory: named by the settings, locked by one process at a time."""

from __future__ import annotations

import hashlib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradfilter.lab._run_files import ForeignError, read_json, refuse_link
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._config_checks import check_values
from gradfilter.lab.train._train_config import PLACE, WATCHING, TrainConfig, setting

# --- Recorded settings, read again by measurements and reports ---


HINTS = typing.get_type_hints(TrainConfig)
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def check_types(settings: Mapping[str, Any]) -> None:
    """Refuse settings whose type differs from that in this version.

    Raises:
        ForeignError: A setting has another type.
    """
    for name, value in settings.items():
        if name in HINTS:
            _typed(name, HINTS[name], value)


def config_of(settings: Mapping[str, Any], what: str) -> TrainConfig:
    """Read recorded settings. They are not parsed as options: one could smuggle in another.

    Args:
        settings: Settings from a ``config.json``.
        what: The name of their owner, for the error message.

    Raises:
        UsageError: They are not settings of this version.
    """
    unknown = sorted(settings.keys() - HINTS.keys())
    try:
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ForeignError(f"this version does not know its settings {names}")
        config = TrainConfig(**{n: _typed(n, HINTS[n], value) for n, value in settings.items()})
        check_values(config)
    except ValueError as error:  # ForeignError and UsageError
        raise UsageError(f"{what} cannot be used: {str(error).rstrip('.')}.") from None
    return config


def _typed(name: str, hint: Any, value: Any) -> Any:
    """Convert a JSON value to the type of a setting.

    Raises:
        ForeignError: The value does not have that type.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _typed(name, parts[0], value)
    if origin is typing.Literal and value in parts and isinstance(value, str):
        return value
    if origin is tuple and isinstance(value, list):
        many = parts[-1] is Ellipsis
        if many or len(value) == len(parts):
            return tuple(_typed(name, parts[0], part) for part in value)
    if hint is float and isinstance(value, float):
        return float(value)
    if hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    expected = WORDS.get(hint, "one of its values" if origin is typing.Literal else "text")
    raise ForeignError(
        f"its setting {name} does not fit this version: {value!r:.80} is not {expected}"
    )


# --- The directory ---


LOCK = "run.lock"
LONGEST = 120
"""Largest number of characters in a folder's name; file systems allow 255 bytes."""
MOST = 200
"""Largest number of characters in the name of a folder for one setting."""
MOST_BYTES = 250
"""Largest number of bytes in either name."""


def place_of(config: TrainConfig) -> Path:
    """Return ``SAVE_DIR/[NAME/]MODEL/DATA/SETTING/[noise-0.2000-]seed-S``.

    SETTING joins all settings that differ from the defaults with hyphens; without any it is
    ``default``.
    """
    parts = [
        name.replace("_", "-")
        if value is True
        else f"{name.replace('_', '-')}-{_as_recorded_value(value)}"
        for name, value in setting(config).items()
    ]
    long = _shortened("-".join(parts) or "default", LONGEST)
    noise = f"noise-{config.label_noise:.4f}-" if config.label_noise else ""
    model, data = (
        _shortened(_as_recorded_value(name), MOST) for name in (config.model, config.data)
    )
    return config.save_dir / config.name / model / data / long / f"{noise}seed-{config.seed}"


def _shortened(name: str, longest: int) -> str:
    """Shorten a name; a hash keeps it different from other shortened names."""
    coded = os.fsencode(name)
    if len(name) <= longest and len(coded) <= MOST_BYTES:
        return name
    start = coded[:LONGEST].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(coded).hexdigest()[:8]}"


def _as_recorded_value(value: Any) -> str:
    """Return a value as part of a file name."""
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        text = "-".join(_as_recorded_value(part) for part in value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


class BusyError(UsageError):
    """Another process holds the lock of the directory."""


@contextmanager
def locked_run(place: Path) -> Iterator[None]:
    """Make the run directory and lock it; the lock ends with the process.

    Raises:
        BusyError: Another process holds the lock.
    """
    try:
        new = [folder for folder in (place, *place.parents) if not folder.exists()]
        place.mkdir(parents=True, exist_ok=True)
        refuse_link(place / LOCK)  # older versions of filelock empty the target of a link
        with FileLock(place / LOCK, timeout=0):
            try:
                yield
            finally:
                _tidy(place, new)
    except Timeout:
        raise BusyError(
            f"the run in {str(place)!r} is in use by another process. "
            "Wait for it, or give this one another --name or --seed."
        ) from None


def _tidy(place: Path, new: list[Path]) -> None:
    """Remove the directories that were made for a run that wrote no file."""
    if new and {path.name for path in place.iterdir()} <= {LOCK}:
        with suppress(OSError):  # another process has used it meanwhile
            (place / LOCK).unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


@contextmanager
def run_errors_as_usage(place: Path) -> Iterator[None]:
    """Turn errors of the file system into a message of one line.

    Raises:
        UsageError: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {str(place)!r}: {error.strerror or error}. What was finished before "
            "is intact; free space or name another --save-dir, then --resume."
        ) from None


def is_finished(place: Path) -> bool:
    """Return whether the directory holds a finished run."""
    exists = (place / "config.json").exists()
    return exists and read_config(place).get("status") == "finished"


def refuse_what_is_there(config: TrainConfig, place: Path) -> None:
    """Refuse to overwrite a run, and to resume a run that has other settings.

    Raises:
        UsageError: The directory holds such a run.
    """
    if not (place / "config.json").exists():
        return
    found = read_config(place)
    if not config.resume:
        raise UsageError(
            f"there is a run in {str(place)!r} ({found.get('status')}). Continue it with "
            "--resume, or give this one another --name or --seed."
        )
    own = plain_settings(config)
    # A run of an older version lacks the settings that were added since, and had none of them.
    theirs = plain_settings(TrainConfig()) | found["settings"]
    others = [n for n in own if n not in (*PLACE, *WATCHING) and theirs[n] != own[n]]
    if others:
        raise UsageError(
            f"--resume: the run in {str(place)!r} has other settings: {', '.join(others)}. "
            "Give this one another --name."
        )


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Return every setting as a JSON value."""
    return {name: _jsonable(value) for name, value in asdict(config).items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def read_config(place: Path) -> dict[str, Any]:
    """Read ``config.json`` of a run.

    Raises:
        UsageError: The file is missing, or it cannot be read.
    """
    path = place / "config.json"
    if not path.exists():
        raise UsageError(f"no run in {str(place)!r}: it has no config.json.")
    found = read_json(path, "the record of a run", "Name another directory.", _record)
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


METRICS = "metrics.jsonl"


def run_directories(dirs: Sequence[Path]) -> Iterator[Path]:
    """Yield the directories with a ``config.json`` below some directories, each once.

    Raises:
        UsageError: A directory does not exist.
    """
    seen = set()
    for folder in dirs:
        if not folder.is_dir():
            raise UsageError(
                f"DIR: expected a directory with trainings, found none at {str(folder)!r}. "
                "gradfilter train writes into runs unless --save-dir names another."
            )
        for path in sorted(folder.rglob("config.json")):
            if (real := path.resolve()) not in seen:
                seen.add(real)
                yield path.parent


def without_record(dirs: Sequence[Path]) -> list[str]:
    """Return a line about each file of metrics that has no ``config.json`` next to it."""
    found = {path.resolve() for folder in dirs for path in folder.rglob(METRICS)}
    lost = sorted(path for path in found if not path.with_name("config.json").exists())
    return [f"{str(path)!r} has no config.json next to it." for path in lost]


def find_runs(save_dir: Path, **wanted: Any) -> list[Path]:
    """Find the run directories below a folder that have the wanted settings.

    Args:
        save_dir: The folder to search, with all folders below it.
        **wanted: Fields of `TrainConfig` and their values.
    """
    found = []
    for path in sorted(save_dir.rglob("config.json")):
        try:
            record = read_config(path.parent)
        except UsageError:
            continue  # not a run, or an incomplete one
        settings = record["settings"]
        if record.get("command") == "train" and all(
            settings.get(name) == value for name, value in wanted.items()
        ):
            found.append(path.parent)
    return found
