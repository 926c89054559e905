"""The command line: subcommands, typed options, and one line for whatever is wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import TypeVar

import tyro

import gradfilter
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._usage import UsageError

Config = TypeVar("Config")

HELP = """\
usage: gradfilter COMMAND [options]

Choose which gradients a neural network follows.

commands:
  demo         three trainings on digits with wrong labels, side by side, in about a minute

options:
  -h, --help   show this text; gradfilter COMMAND --help shows the options of a command
  --version    show the version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line; exit code 2 after a bad value, 130 after Ctrl-C.

    Args:
        args: Without the program's name; None for those of the process.
    """
    command, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        if command in ("-h", "--help"):
            print(HELP, end="")
        elif command == "--version":
            print(f"gradfilter {gradfilter.__version__}")
        elif command == "demo":
            sys.exit(_demo(options))
        else:
            raise UsageError(f"unknown command {command!r}. The commands are: demo.")
    except UsageError as error:
        name = "gradfilter demo" if command == "demo" else "gradfilter"
        if is_first_process():  # of several one says it
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gradfilter: interrupted", file=sys.stderr)
        sys.exit(130)


def _demo(options: Sequence[str]) -> int:
    from gradfilter.lab._demo import demo
    from gradfilter.lab._demo_config import DemoConfig

    return demo(parse(DemoConfig, "gradfilter demo", options))


def parse(config: type[Config], program: str, options: Sequence[str]) -> Config:
    """Read options into a dataclass.

    Raises:
        UsageError: tyro refuses them; what it says, on one line.
        SystemExit: With code 0, after ``--help``.
    """
    shown, refused = StringIO(), StringIO()
    try:
        # Both are caught because tyro draws a plain box, and no coloured one, when stdout is not
        # a terminal.
        with redirect_stdout(shown), redirect_stderr(refused):
            return tyro.cli(config, prog=program, args=options)
    except SystemExit as stop:
        if not stop.code:
            print(shown.getvalue(), end="")
            raise
        said = one_line(refused.getvalue()).rstrip(".")
        raise UsageError(f"{said}. See {program} --help.") from None


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
