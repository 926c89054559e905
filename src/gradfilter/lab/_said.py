"""What tyro says, in words for people: what it could not read, and the text of ``--help``."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator

from gradfilter.lab._usage import did_you_mean

WIDTH = 79
NOT_READ = {
    r"no type matching \{None\}\|INT could .*? from \[(.*?)\]\. Got .*": "a whole number or None",
    r"no type matching \{None\}\|FLOAT could .*? from \[(.*?)\]\. Got .*": "a number or None",
    r"invalid literal for int\(\) with base 10: (.*)": "a whole number",
    r"could not convert string to float: (.*)": "a number",
    r"Could not find valid parse for arguments: \[(.*)\]": "numbers",
    r"Could not parse arguments \[(.*)\] into tuple type .*": "numbers",
}
"""What is said of an option whose value has another type, and what was expected of it."""


def plainly(said: str) -> str:
    """An error without the names that Python has for types.

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
    """For every option that is not known the nearest that is, each in a sentence after a space.

    Args:
        said: The error.
        text: The help, which names all options.

    Examples:
        >>> hints("Unrecognized options: --sed, 3, --colour", "  --seed INT   Of the training.")
        ' Did you mean --seed?'
    """
    prefix = "Unrecognized options: "
    if not said.startswith(prefix):
        return ""
    typed = re.findall(r"(?:^|, )--([\w-]+)", said.removeprefix(prefix))
    known = {*_options(text)}
    # Each once, in the order in which they were typed.
    return "".join(dict.fromkeys(did_you_mean(name, known, "--{}") for name in typed))


def _options(text: str) -> Iterator[str]:
    """Names that begin a line; further to the right they are in somebody's description."""
    for names in re.findall(r"(?m)^ {1,4}(?:-h, )?(--[\w-]+(?:, --[\w-]+)*)", text):
        yield from (name.removeprefix("--") for name in names.split(", "))


def wrapped(text: str) -> str:
    """Help with its paragraphs filled, whose lines tyro leaves as long as it finds them.

    The usage before them and the tables after them stay as they are.
    """
    head, table, rest = text.partition(found[0]) if (found := _table(text)) else (text, "", "")
    usage, *paragraphs = re.split(r"\n\s*\n", head.rstrip())
    width = min(WIDTH, shutil.get_terminal_size().columns)
    filled = [
        textwrap.fill(" ".join(p.split()), width, break_on_hyphens=False, break_long_words=False)
        for p in paragraphs
    ]
    return "\n\n".join([usage, *filled]) + "\n\n" + table + rest


def _table(text: str) -> re.Match[str] | None:
    """The heading of the first table, above its rule."""
    return re.search(r"(?m)^ \S.*\n -{3,}", text)
