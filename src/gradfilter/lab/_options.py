"""Options from a preset, a file, the environment and the command line, in this order of weight."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfilter.lab._reading import content_of, reading
from gradfilter.lab._usage import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FROM_ENVIRONMENT = ("device", "name", "save_dir", "data_dir", "workers")


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they would be typed.

    Examples:
        >>> arguments({"learning_rate": 0.1, "betas": [0.9, 0.95], "nesterov": True, "agc": None})
        ['--learning-rate=0.1', '--betas', '0.9', '0.95', '--nesterov', '--agc=None']
    """
    typed = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list | tuple):
            typed += [f"--{option}", *map(str, value)]
        else:
            typed.append(f"--{option}={value}")  # also where the value begins with a hyphen
    return typed


def environment_arguments(config: type[DataclassInstance]) -> list[str]:
    """What DEVICE, NAME, SAVE_DIR, DATA_DIR and WORKERS say; an empty one says nothing.

    Args:
        config: Whose options they may be.
    """
    names = {field.name for field in fields(config)}
    known = (name for name in FROM_ENVIRONMENT if name in names)
    return arguments({name: value for name in known if (value := os.environ.get(name.upper()))})


def from_files(options: Sequence[str], command: str, config: type[DataclassInstance]) -> list[str]:
    """What the --preset and the --config among the options say, as it would be typed.

    Args:
        options: As they were typed.
        command: Whose table is read.
        config: Whose options may be in it.

    Raises:
        UsageError: There is no such preset or file, it is not TOML, or says something unknown.
    """
    if {"-h", "--help"} & set(options):
        return []
    file = value_of("--config", options)
    preset = value_of("--preset", options)
    settings = read_settings(preset, None if file is None else Path(file), command)
    unknown = sorted(settings.keys() - {field.name for field in fields(config)})
    if unknown:
        raise UsageError(f"--config: unknown settings in {file!r}: {', '.join(unknown)}.")
    return arguments(settings)


def value_of(option: str, options: Sequence[str]) -> str | None:
    """The last value that an option is given.

    Examples:
        >>> value_of("--preset", ["--preset", "a", "--seed", "1", "--preset=b"])
        'b'
    """
    found = None
    for typed, following in zip_longest(options, options[1:]):
        if typed == option:
            found = following
        elif typed.startswith(f"{option}="):
            found = typed.removeprefix(f"{option}=")
    return found


def presets() -> dict[str, Traversable]:
    """The configurations that come with the package, by name."""
    folder = resources.files("gradfilter.lab") / "presets"
    files = (file for file in folder.iterdir() if file.name.endswith(".toml"))
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda f: f.name)}


def read_settings(preset: str | None, file: Path | None, command: str) -> dict[str, Any]:
    """The table of a command in a preset, and over it that in a file.

    Args:
        preset: Its name, or None.
        file: A TOML file, or None.
        command: The name of the table: train, stats or sweep.

    Raises:
        UsageError: There is no such preset or file, or it is not TOML.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        known = presets()
        if preset not in known:
            raise UsageError(
                f"--preset: expected one of {', '.join(known)}, found {preset!r}. "
                "--config reads a file of your own."
            )
        settings |= _table(known[preset], command, {})
    if file is not None:
        settings |= _table(file, command)
    return settings


def as_toml(settings: Mapping[str, Any], command: str) -> str:
    """Settings as a configuration file; what is None is left out, for TOML has no word for it.

    Raises:
        UsageError: One is the name of a file that is not UTF-8, which TOML always is.
    """
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items() if value is not None]
    for line in lines:
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--print-config: expected names in UTF-8, as such a file is, found {line!r:.200}. "
                "Leave that option away, and give it beside --config."
            ) from None
    return "\n".join([f"[{command}]", *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(part) for part in value)}]"
    # JSON escapes what TOML does, except for the character 127.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(file: Path | Traversable, command: str, missing: object = None) -> dict[str, Any]:
    with reading(Path(str(file)), "--config:", "Give it a TOML file in UTF-8."):
        content = content_of(file) if isinstance(file, Path) else file.read_bytes()
        table = tomllib.loads(content.decode()).get(command, missing)
    if not isinstance(table, dict):
        raise UsageError(f"--config: expected a table [{command}] in {str(file)!r}.")
    settings = {name.replace("-", "_"): value for name, value in table.items()}
    odd = {"preset", "config", "print_config"} & settings.keys()
    if odd:
        raise UsageError(f"--config: {', '.join(sorted(odd))} in {str(file)!r} is no setting.")
    return settings
