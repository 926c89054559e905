"""Read options from a preset, a file, the environment and the command line, in this order."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import tyro

from gradfilter.lab._help import Option, help_text, options_of
from gradfilter.lab._run_files import content_of, reading
from gradfilter.lab._usage import UsageError, did_you_mean, refuse_odd, typed_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# --- Parse options into a dataclass ---


Config = TypeVar("Config", bound="DataclassInstance")


def parse(
    config: type[Config],
    program: str,
    options: Sequence[str],
    groups: Mapping[str, Collection[str]] | None = None,
) -> Config:
    """Parse options into a dataclass; the last value of a repeated option is used.

    Args:
        config: The dataclass.
        program: Name of the program in help and errors.
        options: Options of the command line.
        groups: Fields by the heading under which help lists them; None for one list.

    Raises:
        UsageError: An option is unknown, or its value cannot be read.
        SystemExit: With code 0, after ``--help``.
    """
    if {"-h", "--help"} & {*options}:
        print(help_text(config, program, groups or {}), end="")
        raise SystemExit(0)
    box = StringIO()
    try:
        known = options_of(config)
        _refuse_unknown(known, options)
        _refuse_unreadable(known, options)
        with redirect_stdout(box), redirect_stderr(box):
            parsed = tyro.cli(config, prog=program, args=options)
    except UsageError as error:
        raise UsageError(f"{error} See {program} --help.") from None
    except SystemExit:
        raise UsageError(f"{one_line(box.getvalue()).rstrip('.')}. See {program} --help.") from None
    refuse_odd(parsed)
    return parsed


def _refuse_unknown(known: Sequence[Option], options: Sequence[str]) -> None:
    """Refuse unknown options, with the nearest known one of each."""
    names = [name.removeprefix("--") for option in known for name in option.names]
    unread: list[str] = []
    nearest: dict[str, None] = {}  # each once, in the order of the command line
    unknown = False
    for typed in options:
        if typed.startswith("--"):
            name = typed_name(typed).removeprefix("--")
            unknown = name not in names
            nearest |= {did_you_mean(name, names, "--{}"): None} if unknown else {}
        unread += [typed] if unknown else []
    if unread:
        raise UsageError(f"Unrecognized options: {', '.join(unread)}.{''.join(nearest)}")


def _refuse_unreadable(known: Sequence[Option], options: Sequence[str]) -> None:
    """Refuse values that are not numbers where numbers are expected."""
    given: dict[str, list[str]] = {"": []}
    values = given[""]
    for typed in options:
        if typed.startswith("--"):
            _, equals, value = typed.partition("=")
            values = given[typed_name(typed)] = [value] if equals else []
        else:
            values.append(typed)
    for option in known:
        values = given.get(option.names[0], []) if option.names else []
        several = get_origin(option.kind) is tuple
        kind = get_args(option.kind)[0] if several else option.kind
        read = values if several else values[:1]  # tyro refuses others
        if kind not in NUMBERS or all(_is(kind, v, option.may_be_none) for v in read):
            continue
        expected = "numbers" if several else NUMBERS[kind] + " or None" * option.may_be_none
        found = ", ".join(map(repr, read))
        raise UsageError(f"{option.names[0]}: expected {expected}, found {found}.")


NUMBERS: Mapping[type, str] = {int: "a whole number", float: "a number"}


def _is(kind: type, text: str, may_be_none: bool) -> bool:
    """Return whether tyro reads a text as a value of this type."""
    try:
        kind(text)
    except ValueError:
        return may_be_none and text == "None"
    return True


def one_line(box: str) -> str:
    """Return the message in tyro's error box, without title, rules, and advice below the rule."""
    lines = [line.strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("-"):
            parts.append([])
        elif line:
            parts[-1].append(line)
    texts = [" ".join(part) for part in parts if part] or ["bad options"]
    return texts[min(1, len(texts) - 1)]


# --- Sources of options ---


FROM_ENVIRONMENT = ("device", "name", "save_dir", "data_dir", "workers")


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Convert settings to options of the command line.

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
            typed.append(f"--{option}={value}")  # also for a value that begins with a hyphen
    return typed


def environment_arguments(config: type[DataclassInstance]) -> list[str]:
    """Convert DEVICE, NAME, SAVE_DIR, DATA_DIR and WORKERS to options; empty ones are ignored.

    Args:
        config: The dataclass of options; variables of other options are ignored.
    """
    names = {field.name for field in fields(config)}
    known = (name for name in FROM_ENVIRONMENT if name in names)
    return arguments({name: value for name in known if (value := os.environ.get(name.upper()))})


def from_files(options: Sequence[str], command: str, config: type[DataclassInstance]) -> list[str]:
    """Read the preset and the file that --preset and --config name, as options.

    Args:
        options: Options of the command line.
        command: Name of the table to read.
        config: The dataclass whose options may be in the table.

    Raises:
        UsageError: The preset or file does not exist, is not TOML, or has an unknown setting.
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
    """Return the last value of an option.

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
    """Return the configuration files of the package, by name."""
    folder = resources.files("gradfilter.lab") / "presets"
    files = (file for file in folder.iterdir() if file.name.endswith(".toml"))
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda f: f.name)}


def read_settings(preset: str | None, file: Path | None, command: str) -> dict[str, Any]:
    """Read the table of a command in a preset, updated by that in a file.

    Args:
        preset: Name of the preset, or None.
        file: A TOML file, or None.
        command: Name of the table: train, stats or sweep.

    Raises:
        UsageError: The preset or file does not exist, or it is not TOML.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        known = presets()
        if preset not in known:
            raise UsageError(
                f"--preset: expected one of {', '.join(known)}, found {preset!r}. "
                "--config reads your own file."
            )
        settings |= _read_table(known[preset], command, {})
    if file is not None:
        settings |= _read_table(file, command)
    return settings


def as_toml(settings: Mapping[str, Any], command: str) -> str:
    """Return settings as a configuration file; None is omitted, because TOML has no null.

    Raises:
        UsageError: A setting is a file name that is not UTF-8, as TOML requires.
    """
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items() if value is not None]
    for line in lines:
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--print-config: expected names in UTF-8, as such a file is, found {line!r:.200}. "
                "Omit that option, and give it together with --config."
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


def _read_table(file: Path | Traversable, command: str, missing: object = None) -> dict[str, Any]:
    with reading(Path(str(file)), "--config:", "Give it a TOML file in UTF-8."):
        content = content_of(file) if isinstance(file, Path) else file.read_bytes()
        table = tomllib.loads(content.decode()).get(command, missing)
    if not isinstance(table, dict):
        raise UsageError(f"--config: expected a table [{command}] in {str(file)!r}.")
    settings = {name.replace("-", "_"): value for name, value in table.items()}
    odd = {"preset", "config", "print_config"} & settings.keys()
    if odd:
        raise UsageError(f"--config: {', '.join(sorted(odd))} in {str(file)!r} is not a setting.")
    return settings
