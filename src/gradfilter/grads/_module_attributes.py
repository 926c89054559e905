"""Track plain Python attributes of modules: counters, remembered activations, generators.

Neither autograd nor the parameter swap handles them. A repeated pass must find them as the first
pass did, and a pass over all rows must not leave its own tensors in them.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import operator
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

STANDARD = frozenset(nn.Module().__dict__)
"""The attributes of every module: parameters, buffers, submodules, hooks, the mode."""

CONTAINERS: tuple[type, ...] = (list, dict, set, deque, OrderedDict, defaultdict)

TREES = (Tensor, dict, list, tuple, set, deque)

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""Types of values that contain no other values."""

Attribute = tuple[str, Any, Any]
"""The dotted name, the value before and the value now; `MISSING` if there is none."""

MISSING: Any = object()

Table = tuple[str, MutableMapping[str, Any], frozenset[str]]
"""The name of an owner, its values, and the names of those to omit."""

FOREIGN = sys.stdlib_module_names | {
    *("torch", "numpy", "gradfilter", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("transformers", "accelerate"),
}
"""Packages whose objects are not searched for attributes."""

SEARCHED = 100
"""The number of items up to which a container is searched for modules and objects."""

ITEMS = (list, dict, deque)
"""Containers whose items a function may assign."""

NESTED = 8
"""The depth to which containers and functions are searched for modules and objects."""


class Attributes:
    """The attributes of modules at one moment.

    Args:
        modules: The modules by name, each once.
        more: Other dicts of values, each with the name of its owner.
        objects: Other objects, each with a name.

    Attributes:
        tensors: The tensors in them, with their names.
        generators: The random generators among them, torch's, NumPy's and Python's.
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
        none = frozenset[str]()
        seen = {id(module) for module in modules.values()}
        tables: list[Table] = [
            *((name, vars(module), STANDARD) for name, module in modules.items()),
            *((name, table, none) for name, table in self._more),
            *_class_tables({type(module) for module in modules.values()}, seen),
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
                held[key] = value, _content(value)
                label = f"{name}.{key}" if name else key
                if isinstance(value, TREES):
                    self.tensors.extend((label, tensor) for tensor in tensors_in(value))
                if isinstance(value, PlainValues):
                    tables.append((label, value, none))
                for owner in owners_in(value):
                    self._add(owner, label, seen, tables)
            self._held.append(_Snapshot(name, table, skipped, held, len(table)))

    def _add(self, owner: Any, label: str, seen: set[int], tables: list[Table]) -> None:
        if not _is_generator(owner):
            tables.extend(_tables_of(owner, label, seen))
        elif id(owner) not in seen:
            seen.add(id(owner))
            self.generators.append((label, owner))

    def changes(self) -> Iterator[Attribute]:
        """Yield the changes since that moment, also inside lists, dicts and sets."""
        for name, now, skipped, before, size in self._held:
            for key, (value, content) in before.items():
                present = now.get(key, MISSING)
                if not (same_value(value, present) and _holds_same_objects(content, present)):
                    yield f"{name}.{key}" if name else key, content, present
            if len(now) != size:
                for key in now.keys() - before.keys() - skipped:
                    yield f"{name}.{key}" if name else key, MISSING, now[key]

    def present(self) -> Attributes:
        """Return the attributes of the same modules now."""
        return Attributes(self._modules, self._more, self._objects)

    def restore(self, *, containers: bool = True) -> None:
        """Restore the attributes of that moment.

        Args:
            containers: False to leave the contents of lists, dicts and sets as they are.
        """
        for _, now, skipped, before, _ in self._held:
            for key in now.keys() - before.keys() - skipped:
                del now[key]
            for key, (value, content) in before.items():
                if now.get(key, MISSING) is not value:
                    now[key] = value
                if containers and content is not value:
                    _refill(value, content)

    def convert_changed(self, convert: Callable[[Tensor], Tensor]) -> bool:
        """Replace every tensor in changed attributes by ``convert(tensor)``.

        Returns:
            True if any attribute has changed.
        """
        changed = [
            held
            for held in self._held
            if len(held.table) != held.size or _differ(held.before, held.table)
        ]
        for held in changed:
            for key, value in list(held.table.items()):
                if key not in held.skipped:
                    found = _converted(value, convert)
                    if found is not value:
                        held.table[key] = found
        return bool(changed)


# --- Objects that a value refers to ---


def owners_in(value: Any, *, names: bool = False) -> Iterator[Any]:
    """Yield the modules, objects and functions of the user, and generators, that a value refers to.

    These are the value itself, items of containers, the arguments of partials, the objects of bound
    methods, and what functions close over or have as defaults: a call of the value may change their
    attributes. The containers on the way are among them.

    Args:
        value: Any value.
        names: True to include the globals that functions use.
    """
    seen: set[int] = set()
    found = [(value, NESTED)]
    for item, depth in found:  # grows while it is searched
        if type(item) in PLAIN or id(item) in seen or isinstance(item, Tensor):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module) or _has_attributes(item) or _is_generator(item):
            yield item
            continue
        if _is_own_function(item) or (type(item) in ITEMS and item is not value):
            yield item
        if depth:
            found.extend((part, depth - 1) for part in _parts_of(item, names))


def _parts_of(value: Any, names: bool) -> Iterable[Any]:
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return (value.__self__,)
    if _is_own_function(value):
        code, table = value.__code__, value.__globals__
        return (
            *_closed_over(value),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(table[name] for name in code.co_names if names and name in table),
        )
    if type(value) in (*CONTAINERS, tuple) and len(value) <= SEARCHED:
        return tuple(value.values() if isinstance(value, dict) else value)
    return ()


def _is_own_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and _defining_package(value) not in FOREIGN


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is still empty
            yield cell.cell_contents


def _tables_of(owner: Any, label: str, seen: set[int]) -> Iterator[Table]:
    """Yield the attributes, buffers and class attributes of an object or a module, each once."""
    if isinstance(owner, FunctionType):
        if id(owner) not in seen:
            seen.add(id(owner))
            yield label, _FunctionValues(owner), frozenset()
        return
    if type(owner) in ITEMS:
        if id(owner) not in seen:
            seen.add(id(owner))
            yield label, _ItemValues(owner), frozenset()
        return
    if not isinstance(owner, nn.Module):
        if id(owner) not in seen:
            seen.add(id(owner))
            if hasattr(owner, "__dict__"):
                yield label, vars(owner), frozenset()
            if slots := _slots(type(owner)):
                yield label, _SlotValues(owner, slots), frozenset()
            yield from _class_tables([type(owner)], seen)
        return
    for name, part in owner.named_modules(prefix=label):
        if id(part) not in seen:
            seen.add(id(part))
            yield name, vars(part), STANDARD
            yield name, part._buffers, frozenset()
            yield from _class_tables([type(part)], seen)


def _class_tables(kinds: Iterable[type], seen: set[int]) -> Iterator[Table]:
    """Yield the attributes of the user's own classes and their base classes, each once."""
    for kind in kinds:
        if _defining_package(kind) not in FOREIGN:
            for base in kind.__mro__:
                if id(base) not in seen and _defining_package(base) not in FOREIGN:
                    seen.add(id(base))
                    yield base.__name__, _ClassValues(base), frozenset()


class Owners:
    """Objects whose attributes a call of this object may change, by name; a base class."""

    def __init__(self, **owners: Any) -> None:
        vars(self).update(owners)


class PlainValues(MutableMapping[str, Any]):
    """The numbers, texts and None among the attributes of an object."""

    def __init__(self, owner: Any) -> None:
        self._table: dict[str, Any] = vars(owner)

    @override
    def __getitem__(self, key: str) -> Any:
        return self._table[key]

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        self._table[key] = value

    @override
    def __delitem__(self, key: str) -> None:
        del self._table[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return (key for key, value in self._table.items() if type(value) in PLAIN)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


class _FunctionValues(MutableMapping[str, Any]):
    """The numbers and texts that a function can assign outside of itself.

    These are its ``nonlocal`` and ``global`` names.
    """

    def __init__(self, function: FunctionType) -> None:
        code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._names = {
            step.argval
            for step in dis.get_instructions(code)
            if step.opname in ("STORE_GLOBAL", "STORE_DEREF")
        } & {*self._cells, *code.co_names}

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._cells:
            return self._globals[key]
        try:
            return self._cells[key].cell_contents
        except ValueError:  # the cell is still empty
            raise KeyError(key) from None

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._cells:
            self._cells[key].cell_contents = value
        else:
            self._globals[key] = value

    @override
    def __delitem__(self, key: str) -> None:
        if key in self._cells:
            del self._cells[key].cell_contents
        else:
            del self._globals[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return (name for name in sorted(self._names) if type(self.get(name, MISSING)) in PLAIN)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


class _ItemValues(MutableMapping[Any, Any]):
    """The numbers and texts that a list or a dict holds now. Later items do not count: they log."""

    def __init__(self, container: Any) -> None:
        self._container = container
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        self._keys = [key for key, value in pairs if type(value) in PLAIN]

    @override
    def __getitem__(self, key: Any) -> Any:
        try:
            return self._container[key]
        except IndexError:
            raise KeyError(key) from None

    @override
    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self._container, dict) or key < len(self._container):
            self._container[key] = value

    @override
    def __delitem__(self, key: Any) -> None:
        del self._container[key]

    @override
    def __iter__(self) -> Iterator[Any]:
        return (key for key in self._keys if self.get(key, MISSING) is not MISSING)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


def _slots(kind: type) -> list[str]:
    """Return the names that classes with ``__slots__`` declare."""
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


class _SlotValues(MutableMapping[str, Any]):
    """The values that an object has in its ``__slots__``."""

    def __init__(self, owner: Any, names: list[str]) -> None:
        self._owner, self._names = owner, names

    @override
    def __getitem__(self, key: str) -> Any:
        if key in self._names and hasattr(self._owner, key):
            return getattr(self._owner, key)
        raise KeyError(key)

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._owner, key, value)

    @override
    def __delitem__(self, key: str) -> None:
        delattr(self._owner, key)

    @override
    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._owner, name))

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


class _ClassValues(MutableMapping[str, Any]):
    """The values of a class that its objects share; methods and the like are omitted."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @override
    def __getitem__(self, key: str) -> Any:
        return vars(self._kind)[key]

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._kind, key, value)

    @override
    def __delitem__(self, key: str) -> None:
        delattr(self._kind, key)

    @override
    def __iter__(self) -> Iterator[str]:
        for key, value in vars(self._kind).items():
            if not key.startswith("__") and (type(value) in PLAIN or isinstance(value, TREES)):
                yield key

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


def _defining_package(definition: type | FunctionType) -> str:
    return str(definition.__module__).partition(".")[0]


def _has_attributes(value: Any) -> bool:
    """Return whether a value is an object of the user's own, whose attributes a loss may change.

    Objects of the standard library and of frameworks (loggers, trainers, configurations) change for
    other reasons.
    """
    return (
        (hasattr(value, "__dict__") or bool(_slots(type(value))))
        and _defining_package(type(value)) not in FOREIGN
        and not isinstance(value, (nn.Module, type))
    )


class _Snapshot(NamedTuple):
    """The values of one dict at one moment, each with a copy of its content."""

    name: str
    table: MutableMapping[str, Any]
    skipped: frozenset[str]
    before: dict[str, tuple[Any, Any]]
    size: int


def same_value(before: Any, now: Any) -> bool:
    """Return whether two values are the same object, or equal plain values."""
    if before is now:
        return True
    return type(before) in PLAIN and type(now) is type(before) and bool(before == now)


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
            content is not value and not _holds_same_objects(content, present)
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


def _holds_same_objects(content: Any, now: Any) -> bool:
    """Return whether a container holds the same objects; other values were compared before."""
    if type(content) not in CONTAINERS:
        return True
    if type(content) is not type(now) or len(content) != len(now):
        return False
    if isinstance(content, set):
        return bool(content == now)
    if isinstance(content, dict):
        return content.keys() == now.keys() and all(
            _same_item(item, now[key]) for key, item in content.items()
        )
    return all(map(_same_item, content, now))


def _same_item(item: Any, now: Any) -> bool:
    return _holds_same_objects(item, now) if type(item) in CONTAINERS else same_value(item, now)


def _refill(value: Any, content: Any) -> None:
    """Restore the content of a container."""
    if _holds_same_objects(content, value):
        return
    content = _content(content)  # the module will also write into the containers in it
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


def _is_generator(value: Any) -> bool:
    return (
        isinstance(value, torch.Generator)
        or hasattr(value, "bit_generator")
        or (hasattr(value, "getstate") and hasattr(value, "setstate"))
        or type(value).__name__ == "RandomState"
    )
