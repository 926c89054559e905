"""Read options from a preset, a file, the environment and the command line, in this order."""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from gradfilter.lab._run_files import content_of, reading
from gradfilter.lab._usage import UsageError, did_you_mean, refuse_odd

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# --- Options without a default: help shows their type, and not None ---


MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
MaybeStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


# --- Help and messages of tyro in plain words ---


WIDTH = 79
NOT_READ = {
    r"no type matching \{None\}\|INT could .*? from \[(.*?)\]\. Got .*": "a whole number or None",
    r"no type matching \{None\}\|FLOAT could .*? from \[(.*?)\]\. Got .*": "a number or None",
    r"invalid literal for int\(\) with base 10: (.*)": "a whole number",
    r"could not convert string to float: (.*)": "a number",
    r"Could not find valid parse for arguments: \[(.*)\]": "numbers",
    r"Could not parse arguments \[(.*)\] into tuple type .*": "numbers",
}
"""Errors of tyro for a value of another type, and what was expected."""


def plainly(said: str) -> str:
    """Rewrite an error without names of Python types.

    Examples:
        >>> plainly("Error parsing --seed: invalid literal for int() with base 10: 'x'")
        "--seed: expected a whole number, found 'x'"
    """
    parsing = re.fullmatch(r"Error parsing (--[\w-]+): (.*)", said)
    for pattern, expected in NOT_READ.items() if parsing else ():
        if parsing and (found := re.fullmatch(pattern, parsing[2])):
            return f"{parsing[1]}: expected {expected}, found {found[1]}"
    return said


def hints(said: str, text: str) -> str:
    """Suggest the nearest known option for every unknown one, each in a sentence after a space.

    Args:
        said: The error message.
        text: The help, which names all options.

    Examples:
        >>> hints("Unrecognized options: --sed, 3, --colour", "  --seed INT   Random seed.")
        ' Did you mean --seed?'
    """
    prefix = "Unrecognized options: "
    if not said.startswith(prefix):
        return ""
    typed = re.findall(r"(?:^|, )--([\w-]+)", said.removeprefix(prefix))
    known = {*_options(text)}
    # Each once, in the order of the command line.
    return "".join(dict.fromkeys(did_you_mean(name, known, "--{}") for name in typed))


def _options(text: str) -> Iterator[str]:
    """Yield option names at the start of a line; others are part of a description."""
    for names in re.findall(r"(?m)^ {1,4}(?:-h, )?(--[\w-]+(?:, --[\w-]+)*)", text):
        yield from (name.removeprefix("--") for name in names.split(", "))


def wrapped(text: str) -> str:
    """Wrap the paragraphs of a help text, which tyro does not wrap.

    The usage before them and the tables after them are unchanged.
    """
    head, table, rest = text.partition(found[0]) if (found := _find_table(text)) else (text, "", "")
    usage, *paragraphs = re.split(r"\n\s*\n", head.rstrip())
    width = min(WIDTH, shutil.get_terminal_size().columns)
    filled = [
        textwrap.fill(" ".join(p.split()), width, break_on_hyphens=False, break_long_words=False)
        for p in paragraphs
    ]
    return "\n\n".join([usage, *filled]) + "\n\n" + table + rest


def grouped(text: str, groups: Mapping[str, Collection[str]]) -> str:
    r"""List the options of a help text under several headings.

    Args:
        text: The help of tyro.
        groups: Fields by heading. Options of other fields stay in the first table.

    Examples:
        >>> help = " options\n --------\n  --seed INT\n      A seed.\n  --last"
        >>> print(grouped(help, {"data": ["seed"]}))
         options
         --------
          --last
        <BLANKLINE>
         data
         --------
          --seed INT
              A seed.
    """
    if not groups or not (found := _find_table(text)):
        return text
    heading, rule = found[0].split("\n")
    heading_of = {name: title for title, names in groups.items() for name in names}
    tables: dict[str, list[str]] = {title: [] for title in ("", *groups)}
    title = ""
    lines = [line.rstrip() for line in text[found.start() :].splitlines()]
    for line, below in zip_longest(lines, lines[1:], fillvalue=""):
        if not line or set(line.strip()) == {"-"} or (below and set(below.strip()) == {"-"}):
            continue  # a blank line, or the rule and the heading of a table
        for name in _options(line):
            title = heading_of.get(name.replace("-", "_"), "")
            break
        tables[title].append(line)
    full = "-" * len(rule.strip())
    return (
        text[: found.start()]
        + "\n\n".join(
            "\n".join([f" {title}" if title else heading.rstrip(), f" {full}", *rows])
            for title, rows in tables.items()
            if rows
        )
        + ("\n" if text.endswith("\n") else "")
    )


def _find_table(text: str) -> re.Match[str] | None:
    """Find the heading of the first table, above its rule."""
    return re.search(r"(?m)^ \S.*\n -{3,}", text)


# --- Parse options into a dataclass ---


Config = TypeVar("Config")


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
        UsageError: tyro refuses the options; its message, on one line.
        SystemExit: With code 0, after ``--help``.
    """
    shown, refused = StringIO(), StringIO()
    try:
        # Both are redirected: tyro draws a plain box instead of a coloured one when stdout is
        # not a terminal.
        with redirect_stdout(shown), redirect_stderr(refused):
            parsed = tyro.cli(config, prog=program, args=options)
    except SystemExit as stop:
        if not stop.code:
            print(wrapped(grouped(shown.getvalue(), groups or {})), end="")
            raise
        said = plainly(one_line(refused.getvalue()).rstrip("."))
        near = hints(said, _help(config, program)) if "Unrecognized" in said else ""
        raise UsageError(f"{said}.{near} See {program} --help.") from None
    refuse_odd(parsed)
    return parsed


def _help(config: type[Config], program: str) -> str:
    """Return the help text of tyro."""
    shown = StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        tyro.cli(config, prog=program, args=["--help"])
    return shown.getvalue()


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
