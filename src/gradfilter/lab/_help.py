"""Describe the options of a dataclass: their names, types, defaults and texts."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from gradfilter.lab._usage import option_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# --- The options of a dataclass ---


@dataclass(frozen=True)
class Option:
    """An option of the command line, or an argument without a name.

    Attributes:
        field: Name of the field.
        kind: Type of the value, without None.
        may_be_none: Whether None is a value.
        default: Default of the field.
        text: Description.
        positional: Whether it is an argument without a name.
    """

    field: str
    kind: Any
    may_be_none: bool
    default: Any
    text: str
    positional: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names on the command line; a flag has two."""
        if self.positional:
            return ()
        name = option_name(self.field)
        return (name, f"--no-{name.removeprefix('--')}") if self.kind is bool else (name,)


@cache
def options_of(config: type[DataclassInstance]) -> tuple[Option, ...]:
    """Return the options of a dataclass, and of the dataclasses in its fields."""
    return tuple(_options(config))


def _options(config: type[DataclassInstance]) -> Iterator[Option]:
    hints, extras = get_type_hints(config), get_type_hints(config, include_extras=True)
    texts = _field_texts(config)
    for field in fields(config):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options(typing.cast("type[DataclassInstance]", hint))
            continue
        may_be_none = get_origin(hint) in (types.UnionType, typing.Union)
        kind = get_args(hint)[0] if may_be_none else hint
        marks = getattr(extras[field.name], "__metadata__", ())
        positional = _POSITIONAL in marks
        text = " ".join(texts[field.name].split())
        yield Option(field.name, kind, may_be_none, field.default, text, positional)


_Example = Positional[Path]
_POSITIONAL: Any = get_args(_Example)[1]
"""The mark that tyro puts on the type of an argument without a name."""


def _field_texts(config: type) -> dict[str, str]:
    """Return the string below every field, which Python itself does not keep."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: below.value.value
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


# --- Help ---


WIDTH = 79
"""Largest width of a paragraph."""
COLUMN = 25
"""The column at which descriptions begin."""
LONGEST = 50
"""Largest number of characters of a list of choices next to the name of its option."""


def help_text(
    config: type[DataclassInstance],
    program: str,
    groups: Mapping[str, Collection[str]],
) -> str:
    """Return the help of a command.

    Args:
        config: The dataclass of its options.
        program: Name of the program.
        groups: Names of fields by the heading under which they are listed. Others come first.
    """
    columns = shutil.get_terminal_size().columns
    known = options_of(config)
    arguments = [found for found in known if found.positional]
    usage = " ".join([f"usage: {program} [-h] [OPTIONS]", *map(_argument, arguments)])
    paragraphs = [
        _filled(paragraph, min(WIDTH, columns))
        for paragraph in (inspect.getdoc(config) or "").split("\n\n")
    ]
    grouped = {name for names in groups.values() for name in names}
    rest = [found for found in known if not found.positional and found.field not in grouped]
    tables = {
        "arguments": [_row(_argument(found), _description(found), columns) for found in arguments],
        "options": [
            _row("-h, --help", "Show this help and exit.", columns),
            *(_row(_invocation(found), _description(found), columns) for found in rest),
        ],
    }
    for heading, names in groups.items():
        tables[heading] = [
            _row(_invocation(found), _description(found), columns)
            for found in known
            if found.field in names
        ]
    rule = "-" * (columns - 2)
    drawn = ["\n".join([f" {h}", f" {rule}", *rows]) for h, rows in tables.items() if rows]
    return "\n\n".join([usage, *paragraphs, *drawn]) + "\n"


def _filled(text: str, width: int) -> str:
    return textwrap.fill(
        " ".join(text.split()), width, break_on_hyphens=False, break_long_words=False
    )


def _row(invocation: str, description: str, columns: int) -> str:
    """Return an option with its description, which begins below a long name."""
    text = _filled(description, max(30, columns - COLUMN))
    head = f"  {invocation}"
    if len(head) <= COLUMN - 2:
        return head.ljust(COLUMN) + textwrap.indent(text, " " * COLUMN).lstrip()
    return f"{head}\n{textwrap.indent(text, ' ' * COLUMN)}"


def _argument(found: Option) -> str:
    name = found.field.upper()
    return f"[{name.removesuffix('S')} ...]" if get_origin(found.kind) is tuple else f"[{name}]"


def _invocation(found: Option) -> str:
    return f"{', '.join(found.names)} {value_name(found.kind)}".rstrip()


def value_name(kind: Any) -> str:
    """Return the value of an option in its help; empty for a flag.

    Examples:
        >>> value_name(int), value_name(tuple[float, float]), value_name(tuple[str, ...])
        ('INT', 'FLOAT FLOAT', '[STR ...]')
        >>> value_name(Literal["sgd", "adam"])
        '{sgd,adam}'
    """
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return f"[{value_name(parts[0])} ...]" if ... in parts else " ".join(map(value_name, parts))
    if get_origin(kind) is Literal:
        choices = f"{{{','.join(parts)}}}"
        return choices if len(choices) <= LONGEST else "NAME"
    return {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}.get(kind, "")


def _description(found: Option) -> str:
    """Return the text of an option, with its default if that says something."""
    text = found.text
    if value_name(found.kind) == "NAME":
        text = f"{text.rstrip('.')}: {', '.join(get_args(found.kind))}."
    default = found.default
    if default is None or default is False or default in ("", ()):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})"
