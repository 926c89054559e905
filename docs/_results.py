"""A file of measured results as a page of the site: tables with an anchor for every value.

A page cites a number as a link into a JSON file, ``x.json#/workloads/model=mlp/ratio/median``. On a
code host the link opens the JSON. On the site it leads to the value in a table.
"""

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Place = tuple[str | int, ...]
"""The keys and indices that lead to a value."""

MACHINE = {
    *("machine", "device", "device_name", "cores", "load", "threads"),
    *("torch", "python", "gradfilter", "peers", "date"),
}
MOST_COLUMNS = 16  # more of them become tables of their own
MOST_FACTS = 12

# --- Walks and anchors ---


def locate(contents: Any, walk: str) -> Place:
    """Return the place that a walk leads to.

    Args:
        contents: The contents of a JSON file.
        walk: ``/key`` into an object, ``/3`` into a list, and ``/key=value&other=value`` to the one
            item of a list that has these values. Steps are quoted as in a URL.

    Raises:
        LookupError: The walk leads nowhere, or to several items.
    """
    place: list[str | int] = []
    for step in map(unquote, walk.removeprefix("/").split("/")):  # %2F is part of a name
        found = at(contents, tuple(place))
        if isinstance(found, dict):
            if step not in found:
                raise LookupError(f"no {step!r}, only {', '.join(map(repr, found))}")
            place.append(step)
        elif "=" in step:
            wanted = dict(pair.split("=", 1) for pair in step.split("&"))
            items = [
                number
                for number, item in enumerate(found)
                if all(str(item.get(key)) == value for key, value in wanted.items())
            ]
            if len(items) != 1:
                raise LookupError(f"{len(items)} items with {step!r}, where one was meant")
            place.append(items[0])
        else:
            place.append(int(step))
    return tuple(place)


def at(contents: Any, place: Place) -> Any:
    """Return the value at a place."""
    for step in place:
        contents = contents[step]
    return contents


def anchors(contents: Any) -> dict[Place, str]:
    """Return a different anchor for every place of a file, without characters that URLs quote."""
    found: dict[Place, str] = {}
    taken: set[str] = set()
    for place in _places(contents):
        steps = (re.sub(r"[^A-Za-z0-9_]+", "-", str(step)).strip("-") or "-" for step in place)
        name = ".".join(steps)
        anchor, number = name, 1
        while anchor in taken:
            number += 1
            anchor = f"{name}--{number}"
        taken.add(anchor)
        found[place] = anchor
    return found


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    for step, inner in _items(value):
        yield (*place, step)
        yield from _places(inner, (*place, step))


def _items(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


# --- The page ---


def page(path: Path) -> str:
    """Return the page of a file as Markdown: its machine, its settings and tables of its values."""
    contents = json.loads(path.read_text())
    writer = _Writer(anchors(contents))
    machine = {key: value for key, value in contents.items() if key in MACHINE}
    others = {key: value for key, value in contents.items() if key not in MACHINE}
    title = str(others.pop("benchmark", path.stem))
    return "\n\n".join(
        [
            # The search of the site is for the text of the documentation.
            "---\nsearch:\n  exclude: true\n---",
            f"# Results: {_plain(title)}",
            f"These are the values of the file [{path.name}]({path.name}). Times are in seconds "
            "unless stated otherwise, and shares are fractions of 1. Numbers are rounded to four "
            "digits. Move the mouse over a number to see its exact value.",
            "## Measured on",
            *writer.parts(machine, (), 3),
            "## Values",
            *writer.parts(others, (), 3),
        ]
    )


class _Writer:
    """Writes values as facts, tables and sections, each value with its anchor."""

    def __init__(self, names: dict[Place, str]) -> None:
        self.names = names

    def parts(self, value: Any, place: Place, level: int) -> Iterator[str]:
        """Write an object or a list: small entries as facts, and the others one after the other."""
        facts = {step: inner for step, inner in _items(value) if _is_small(inner)}
        leaves = [
            (" ".join(map(str, (step, *rest))), (*place, step, *rest))
            for step, inner in facts.items()
            for rest in _leaves(inner)
        ]
        if leaves:
            rows = [
                f"<tr><th>{escape(name)}</th>{self.cell(value, place, leaf)}</tr>"
                for name, leaf in leaves
            ]
            yield "\n".join(["<table>", *rows, "</table>"])
        for step, inner in _items(value):
            if step not in facts:
                yield from self.section(inner, (*place, step), level, _title(value, step))

    def section(self, value: Any, place: Place, level: int, title: str) -> Iterator[str]:
        """Write a heading, and a table if the entries are alike and not too wide."""
        inner = _items(value)
        while len(inner) == 1 and _items(inner[0][1]) and not _is_small(inner[0][1]):
            title = f"{title}, {_title(value, inner[0][0])}"  # one heading for both
            place, value = (*place, inner[0][0]), inner[0][1]
            inner = _items(value)
        yield f"{'#' * min(level, 6)} {_plain(title)} {{#{self.names[place]}}}"
        columns = _columns(value)
        if columns:
            yield self.table(value, place, columns)
        else:
            yield from self.parts(value, place, level + 1)

    def table(self, value: Any, place: Place, columns: list[Place]) -> str:
        """Write entries as rows, and what they contain as columns."""
        named = isinstance(value, dict)
        lines = ["<table>", "<thead>", *_header(columns, named), "</thead>", "<tbody>"]
        for step, inner in _items(value):
            cells = [f"<th>{escape(str(step))}</th>"] if named else []
            has = set(_leaves(inner))
            for column in columns:
                leaf = (*place, step, *column)
                cells.append(self.cell(value, place, leaf) if column in has else "<td></td>")
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return "\n".join([*lines, "</tbody>", "</table>"])

    def cell(self, value: Any, place: Place, leaf: Place) -> str:
        """Write a value of ``value``, which stands at ``place``."""
        found = at(value, leaf[len(place) :])
        if not isinstance(found, list):
            return f'<td id="{self.names[leaf]}"{_exact(found)}>{_shown(found)}</td>'
        each = [
            f'<span id="{self.names[(*leaf, number)]}"{_exact(item)}>{_shown(item)}</span>'
            for number, item in enumerate(found)
        ]
        return f'<td id="{self.names[leaf]}">{", ".join(each)}</td>'


def _is_small(value: Any) -> bool:
    """Return whether a value fits into a few lines of facts."""
    if isinstance(value, list):
        return not any(_items(item) for item in value)
    if isinstance(value, dict):
        inner = list(value.values())
        alike = len(inner) > 1 and all(isinstance(item, dict) for item in inner)
        return not alike and all(map(_is_small, inner)) and len(list(_leaves(value))) <= MOST_FACTS
    return True


def _leaves(value: Any) -> Iterator[Place]:
    """Return the places of numbers, texts and lists of them."""
    if not _items(value) or (isinstance(value, list) and _is_small(value)):
        yield ()
        return
    for step, inner in _items(value):
        yield from ((step, *rest) for rest in _leaves(inner))


def _columns(value: Any) -> list[Place]:
    """Return the columns of a table of the entries; none if they are no table."""
    inner = [item for _, item in _items(value)]
    if not inner or not all(isinstance(item, dict) and item for item in inner):
        return []
    columns = list(dict.fromkeys(place for item in inner for place in _leaves(item)))
    return columns if len(columns) <= MOST_COLUMNS else []


def _header(columns: list[Place], named: bool) -> list[str]:
    corner = "<th></th>" if named else ""
    groups = [" ".join(map(str, column[:-1])) for column in columns]
    last = "".join(f"<th>{escape(str(column[-1]))}</th>" for column in columns)
    rows = [f"<tr>{corner}{last}</tr>"]
    if any(groups):
        spans: list[list[Any]] = []
        for group in groups:
            if spans and spans[-1][0] == group:
                spans[-1][1] += 1
            else:
                spans.append([group, 1])
        cells = "".join(f'<th colspan="{count}">{escape(group)}</th>' for group, count in spans)
        rows.insert(0, f"<tr>{corner}{cells}</tr>")
    return rows


def _title(value: Any, step: str | int) -> str:
    """Return the name of an entry: its key, or the values that other items of the list lack."""
    if isinstance(value, dict):
        return str(step)
    item = value[step]
    named = {k: v for k, v in item.items() if isinstance(v, (str, int)) and not isinstance(v, bool)}
    telling = [
        str(v) if isinstance(v, str) else f"{k} {v}"
        for k, v in named.items()
        if k != "date" and (len(value) == 1 or any(other.get(k) != v for other in value))
    ]
    return ", ".join(telling) or str(step)


def _plain(text: str) -> str:
    """Escape what Markdown and HTML would read as markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(text, quote=False))


def _exact(value: Any) -> str:
    return f' title="{value!r}"' if isinstance(value, float) else ""


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return escape(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
