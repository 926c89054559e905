"""Options as a dataclass, and tyro's box of errors as one line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from typing import TypeVar

import tyro

from gradfilter.lab._said import hints, plainly, wrapped
from gradfilter.lab._usage import UsageError, refuse_odd

Config = TypeVar("Config")


def parse(config: type[Config], program: str, options: Sequence[str]) -> Config:
    """Read options into a dataclass; of an option that is given twice the last value counts.

    Raises:
        UsageError: tyro refuses them; what it says, on one line.
        SystemExit: With code 0, after ``--help``.
    """
    shown, refused = StringIO(), StringIO()
    try:
        # Both are caught because tyro draws a plain box, and no coloured one, when stdout is not
        # a terminal.
        with redirect_stdout(shown), redirect_stderr(refused):
            parsed = tyro.cli(config, prog=program, args=options)
    except SystemExit as stop:
        if not stop.code:
            print(wrapped(shown.getvalue()), end="")
            raise
        said = plainly(one_line(refused.getvalue()).rstrip("."))
        near = hints(said, _help(config, program)) if "Unrecognized" in said else ""
        raise UsageError(f"{said}.{near} See {program} --help.") from None
    refuse_odd(parsed)
    return parsed


def _help(config: type[Config], program: str) -> str:
    """The help as tyro has it."""
    shown = StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        tyro.cli(config, prog=program, args=["--help"])
    return shown.getvalue()


def one_line(box: str) -> str:
    """What tyro's error box says, without title, rules, and advice below the second rule."""
    lines = [line.strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("-"):
            parts.append([])
        elif line:
            parts[-1].append(line)
    texts = [" ".join(part) for part in parts if part] or ["bad options"]
    return texts[min(1, len(texts) - 1)]
