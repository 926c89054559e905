"""Compare and restore the state of a loss outside of parameters and buffers.

This is counters, remembered activations and random generators, in attributes of modules and other
owners. Neither autograd nor the parameter swap handles them. A repeated pass must find them as the
first pass did, and a pass over all rows must not leave its own tensors in them.
"""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfilter.grads._state_owners import (
    CONTAINERS,
    COPIED,
    MISSING,
    PLAIN,
    STANDARD,
    TREES,
    Added,
    ItemValues,
    PlainValues,
    ScriptedValues,
    Table,
    class_tables,
    holds_same_objects,
    is_generator,
    owners_in,
    same_value,
    scripted_tables,
    tables_of,
)

Attribute = tuple[str, Any, Any]
"""The dotted name, the value before and the value now; `MISSING` if there is none."""


class Attributes:
    """The attributes of modules, and of the objects that these refer to, at one moment.

    Args:
        modules: The modules by name, each once.
        more: Other dicts of values, each with the name of its owner.
        objects: Other objects, each with a name.

    Attributes:
        tensors: The tensors in them, with their names.
        generators: The random generators among them, torch's, NumPy's and Python's.
        unwatched: The names of those in scripted modules, whose uses nobody sees.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        more: Iterable[tuple[str, dict[str, Any]]] = (),
        objects: Iterable[tuple[str, Any]] = (),
    ) -> None:
        self._modules, self._more, self._objects = modules, tuple(more), tuple(objects)
        self._held: list[_Snapshot] = []
        self.tensors: list[tuple[str, Tensor]] = []
        self.generators: list[tuple[str, Any]] = []
        self.unwatched: set[str] = set()
        none = frozenset[str]()
        seen = {id(module) for module in modules.values()}
        tables: list[Table] = [
            *[(name, vars(module), STANDARD) for name, module in modules.items()],
            *[
                table
                for name, module in modules.items()
                if isinstance(module, torch.jit.ScriptModule)
                for table in scripted_tables(module, name)
            ],
            *[(name, table, none) for name, table in self._more],
            *class_tables({type(module) for module in modules.values()}, seen),
        ]
        for name, owner in self._objects:
            self._add(owner, name, seen, tables)
        for name, table, skipped in tables:  # grows while objects are found
            held: dict[str, tuple[Any, Any]] = {}
            for key, value in table.items():
                if key in skipped:
                    continue
                if type(value) in PLAIN:
                    held[key] = value, value
                    continue
                if isinstance(value, (list, dict, set, deque)) and len(value) > COPIED:
                    held[key] = value, value  # data
                    continue
                held[key] = value, _content(value)
                label = f"{name}.{key}" if name else key
                if isinstance(table, ScriptedValues):
                    self.unwatched.add(label)
                if isinstance(value, TREES):
                    if type(value) is tuple and all(type(item) in PLAIN for item in value):
                        continue  # most attributes of torch's modules: sizes, strides
                    self.tensors.extend((label, tensor) for tensor in tensors_in(value))
                if isinstance(value, PlainValues):
                    tables.append((label, value, none))
                for owner in owners_in(value, names=True):
                    self._add(owner, label, seen, tables)
            self._held.append(_Snapshot(name, table, skipped, held, len(table)))

    def _add(self, owner: Any, label: str, seen: set[int], tables: list[Table]) -> None:
        if not is_generator(owner):
            tables.extend(tables_of(owner, label, seen))
        elif id(owner) not in seen:
            seen.add(id(owner))
            self.generators.append((label, owner))

    def changes(self) -> Iterator[Attribute]:
        """Yield the changes since that moment, also inside lists, dicts and sets."""
        for name, now, skipped, before, size in self._held:
            for key, (value, content) in before.items():
                present = now.get(key, MISSING)
                if not (same_value(value, present) and holds_same_objects(content, present)):
                    yield f"{name}.{key}" if name else key, content, present
            if len(now) != size:
                for key in now.keys() - before.keys() - skipped:
                    yield f"{name}.{key}" if name else key, MISSING, now[key]

    def present(self) -> Attributes:
        """Return the attributes of the same modules now."""
        return Attributes(self._modules, self._more, self._objects)

    def restore(self, *, keep_added: bool = False) -> None:
        """Restore the attributes of that moment, also the contents of lists, dicts and sets.

        Args:
            keep_added: True to keep what was added to a list or a dict since: a log.
        """
        for _, now, skipped, before, _ in self._held:
            for key in now.keys() - before.keys() - skipped:
                del now[key]
            for key, (value, content) in before.items():
                if now.get(key, MISSING) is not value:
                    now[key] = value
                if content is not value:
                    _refill(value, content, keep_added)

    def added(self) -> list[Added]:
        """Return what was appended since to lists that functions close over: logs."""
        tables = (held.table for held in self._held)
        found = (table.added() for table in tables if isinstance(table, ItemValues))
        return [added for added in found if added is not None]

    def convert_changed(self, convert: Callable[[Tensor], Tensor]) -> bool:
        """Replace every tensor in changed attributes by ``convert(tensor)``.

        Returns:
            True if any attribute has changed.
        """
        changed = [
            held
            for held in self._held
            if len(held.table) != held.size or (held.before and _differ(held.before, held.table))
        ]
        for held in changed:
            for key, value in list(held.table.items()):
                if key not in held.skipped:
                    found = _converted(value, convert)
                    if found is not value:
                        held.table[key] = found
        return bool(changed)


def remove(logs: Iterable[Added]) -> None:
    """Remove what was appended to lists, whatever was appended later."""
    for items, first, end in logs:
        kept = [*items][:first] + [*items][end:]
        items.clear()
        items.extend(kept)


class _Snapshot(NamedTuple):
    """The values of one dict at one moment, each with a copy of its content."""

    name: str
    table: MutableMapping[str, Any]
    skipped: frozenset[str]
    before: dict[str, tuple[Any, Any]]
    size: int


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, and in its lists, tuples, dicts and sets."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from tensors_in(item)


def _differ(before: dict[str, tuple[Any, Any]], now: Mapping[str, Any]) -> bool:
    for key, (value, content) in before.items():
        present = now.get(key, MISSING)
        if present is not value or (
            content is not value and not holds_same_objects(content, present)
        ):
            return True
    return False


def _content(value: Any) -> Any:
    """Return a copy of a container, or the value itself."""
    if type(value) not in CONTAINERS:
        return value
    found = copy.copy(value)
    if isinstance(found, dict):
        for key, item in found.items():
            if type(item) in CONTAINERS:
                found[key] = _content(item)
    elif isinstance(found, (list, deque)):
        for i, item in enumerate(found):
            if type(item) in CONTAINERS:
                found[i] = _content(item)
    return found


def _refill(value: Any, content: Any, keep_added: bool) -> None:
    """Restore the content of a container."""
    if holds_same_objects(content, value):
        return
    content = _content(content)  # the module will also write into the containers in it
    if keep_added and type(value) is list and len(value) > len(content):
        value[: len(content)] = content
        return
    if not (keep_added and isinstance(value, dict)):
        value.clear()
    if isinstance(value, (dict, set)):
        value.update(content)
    else:
        value.extend(content)


def _converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if type(value) in CONTAINERS and any(True for _ in tensors_in(value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, set):
            found = {_converted(item, convert) for item in value}
            if found != value:
                value.clear()
                value.update(found)
            return value
        for key, item in list(items):
            new = _converted(item, convert)
            if new is not item:
                value[key] = new
        return value
    if isinstance(value, tuple) and any(True for _ in tensors_in(value)):
        converted = [_converted(item, convert) for item in value]
        if all(map(operator.is_, converted, value)):
            return value
        plain = type(value) is tuple or not hasattr(value, "_make")
        kind: Any = type(value)
        return tuple(converted) if plain else kind._make(converted)
    return value
