"""Find what holds the state of a loss: modules, objects, functions, containers and generators.

A call of a value may change the attributes of what it refers to. Each such owner is shown as a
table of values, which can be compared and restored.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

STANDARD = frozenset(nn.Module().__dict__)
"""The attributes of every module: parameters, buffers, submodules, hooks, the mode."""

CONTAINERS: tuple[type, ...] = (list, dict, set, deque, OrderedDict, defaultdict)

ITEMS = (list, dict, deque)
"""Containers whose items a function may assign."""

TREES = (Tensor, dict, list, tuple, set, deque)

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""Types of values that contain no other values."""

MISSING: Any = object()

FOREIGN = sys.stdlib_module_names | {
    *("torch", "numpy", "gradfilter", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("transformers", "accelerate"),
}
"""Packages whose objects are not searched for attributes."""

SEARCHED = 100
"""The number of items up to which a container is searched."""

STORES = frozenset((dis.opmap["STORE_GLOBAL"], dis.opmap["STORE_DEREF"]))
"""The instructions by which a function assigns a name outside of itself."""

NESTED = 8
"""The depth to which containers and functions are searched."""


# --- The owners that a value refers to ---


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
        if isinstance(item, nn.Module) or _has_attributes(item) or is_generator(item):
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


def is_generator(value: Any) -> bool:
    return (
        isinstance(value, torch.Generator)
        or hasattr(value, "bit_generator")
        or (hasattr(value, "getstate") and hasattr(value, "setstate"))
        or type(value).__name__ == "RandomState"
    )


class Owners:
    """Objects whose attributes a call of this object may change, by name; a base class."""

    def __init__(self, **owners: Any) -> None:
        vars(self).update(owners)


# --- The values of an owner ---


Table = tuple[str, MutableMapping[str, Any], frozenset[str]]
"""The name of an owner, its values, and the names of those to omit."""


def tables_of(owner: Any, label: str, seen: set[int]) -> Iterator[Table]:
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
            if _slots(type(owner)):
                yield label, _SlotValues(owner), frozenset()
            yield from class_tables([type(owner)], seen)
        return
    for name, part in owner.named_modules(prefix=label):
        if id(part) not in seen:
            seen.add(id(part))
            yield name, vars(part), STANDARD
            yield name, part._buffers, frozenset()
            yield from class_tables([type(part)], seen)


def class_tables(kinds: Iterable[type], seen: set[int]) -> Iterator[Table]:
    """Yield the attributes of the user's own classes and their base classes, each once."""
    for kind in kinds:
        if _defining_package(kind) not in FOREIGN:
            for base in kind.__mro__:
                if id(base) not in seen and _defining_package(base) not in FOREIGN:
                    seen.add(id(base))
                    yield base.__name__, _ClassValues(base), frozenset()


class _View(MutableMapping[Any, Any]):
    """Some attributes of an owner, to read and to restore them."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    @override
    def __getitem__(self, key: str) -> Any:
        return vars(self._owner)[key]

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._owner, key, value)

    @override
    def __delitem__(self, key: str) -> None:
        delattr(self._owner, key)

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


class PlainValues(_View):
    """The numbers, texts and None among the attributes of an object."""

    @override
    def __iter__(self) -> Iterator[str]:
        return (key for key, value in vars(self._owner).items() if type(value) in PLAIN)


class _FunctionValues(_View):
    """The ``nonlocal`` and ``global`` names that a function can assign, with their values."""

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function)
        code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._names: set[str] = set()
        if not STORES.isdisjoint(code.co_code[::2]):  # most functions assign nothing outside
            stored = {s.argval for s in dis.get_instructions(code) if s.opcode in STORES}
            self._names = stored & {*self._cells, *code.co_names}

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._cells:
            return self._globals[key]  # KeyError before the first assignment
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
        return (name for name in sorted(self._names) if self.get(name, MISSING) is not MISSING)


class _ItemValues(_View):
    """The numbers, texts and tensors that a list or a dict holds now.

    Later items are not among them: a loss appends to a list to log.
    """

    def __init__(self, container: Any) -> None:
        super().__init__(container)
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        self._keys = [key for key, v in pairs if type(v) in PLAIN or isinstance(v, Tensor)]

    @override
    def __getitem__(self, key: Any) -> Any:
        try:
            return self._owner[key]
        except IndexError:
            raise KeyError(key) from None

    @override
    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self._owner, dict) or key < len(self._owner):
            self._owner[key] = value

    @override
    def __delitem__(self, key: Any) -> None:
        del self._owner[key]

    @override
    def __iter__(self) -> Iterator[Any]:
        return (key for key in self._keys if self.get(key, MISSING) is not MISSING)


def _slots(kind: type) -> list[str]:
    """Return the names that classes with ``__slots__`` declare."""
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


class _SlotValues(_View):
    """The values that an object has in its ``__slots__``."""

    @override
    def __getitem__(self, key: str) -> Any:
        if key in self:
            return getattr(self._owner, key)
        raise KeyError(key)

    @override
    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and hasattr(self._owner, key)

    @override
    def __iter__(self) -> Iterator[str]:
        return (name for name in _slots(type(self._owner)) if name in self)


class _ClassValues(_View):
    """The values of a class that its objects share; methods and the like are omitted."""

    @override
    def __iter__(self) -> Iterator[str]:
        for key, value in vars(self._owner).items():
            if not key.startswith("__") and (type(value) in PLAIN or isinstance(value, TREES)):
                yield key
