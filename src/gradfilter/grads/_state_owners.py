"""Find what holds the state of a loss: modules, objects, functions, containers and generators.

A call of a value may change the attributes of what it refers to. Each such owner is shown as a
table of values, which can be compared and restored.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, MutableMapping
from functools import lru_cache, partial
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

STANDARD = frozenset(nn.Module().__dict__)
"""The attributes of every module: parameters, buffers, submodules, hooks, the mode."""

CONTAINERS: tuple[type, ...] = (list, dict, set, deque, OrderedDict, defaultdict, Counter)

ITEMS = (list, dict, deque)
"""Containers whose items a function may assign; also classes that are derived from them."""

RECORDS = (SimpleNamespace, Namespace)
"""Classes of the standard library that only hold attributes."""

TREES = (Tensor, dict, list, tuple, set, deque)

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""Types of values that contain no other values."""

MISSING: Any = object()

FOREIGN = sys.stdlib_module_names | {
    *("torch", "numpy", "gradfilter", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("transformers", "accelerate"),
    # Loggers, progress bars and plots.
    *("wandb", "mlflow", "tensorboard", "tensorboardX", "aim", "comet_ml", "neptune", "loguru"),
    *("tqdm", "rich", "matplotlib", "IPython", "ipykernel", "traitlets"),
    # An assert in a test refers to pytest, and so to all of its plugins.
    *("pytest", "_pytest", "pluggy", "hypothesis"),
}
"""Packages whose objects are not searched for attributes.

No loss depends on them, and one logger can refer to thousands of objects, which would be compared
in every step. Data and configurations (pandas, omegaconf) are searched: their values count.
"""

SEARCHED = 100
"""The number of items up to which a container is searched."""

COPIED = 10_000
"""The number of items up to which a container is copied, to see its changes."""

STORES = frozenset((dis.opmap["STORE_GLOBAL"], dis.opmap["STORE_DEREF"]))
"""The instructions by which a function assigns a name outside of itself."""

NESTED = 8
"""The depth to which containers and functions are searched."""


# --- The owners that a value refers to ---


def owners_in(value: Any, *, names: bool = False) -> Iterator[Any]:
    """Yield the modules, objects, classes and functions of the user, and generators, in a value.

    These are the value itself, items of containers, the arguments of partials, the objects of bound
    methods, and what functions close over or have as defaults: a call of the value may change their
    attributes. The containers on the way are among them.

    Args:
        value: Any value.
        names: True to include the globals that functions, and methods that are called, use.
    """
    for item in values_in(value, names=names):
        inner = isinstance(item, ITEMS) and item is not value and len(item) <= COPIED
        if _is_object(item) or is_own_function(item) or is_own_class(item) or inner:
            yield item


def _is_object(value: Any) -> bool:
    """Return whether a value is a module, an object of the user's own, or a generator."""
    if isinstance(value, FunctionType):
        return False
    return isinstance(value, nn.Module) or _has_attributes(value) or is_generator(value)


def values_in(value: Any, *, names: bool = False) -> Iterator[Any]:
    """Yield the value itself and the objects in it, each once: see `owners_in`."""
    seen: set[int] = set()
    found = [(value, NESTED)]
    for item, depth in found:  # grows while it is searched
        if type(item) in PLAIN or id(item) in seen or isinstance(item, Tensor):
            continue
        seen.add(id(item))
        yield item
        if _is_object(item):
            if names and depth:
                found += [(method, depth - 1) for method in _called_methods(item)]
            if not isinstance(item, ITEMS):
                continue
        if depth:
            found += [(part, depth - 1) for part in _parts_of(item, names)]


def _called_methods(value: Any) -> Iterator[FunctionType]:
    """Yield the methods of the user's classes that a call of a module or an object runs first."""
    if isinstance(value, nn.Module):
        yield from forward_methods(value.modules())
    else:
        yield from _methods([type(value)], "__call__")


def forward_methods(modules: Iterable[nn.Module]) -> list[FunctionType]:
    """Return the method ``forward`` of every class of the user, also those of base classes."""
    return _methods(dict.fromkeys(map(type, modules)), "forward")


def _methods(kinds: Iterable[type], name: str) -> list[FunctionType]:
    found: list[FunctionType] = []
    for kind in kinds:
        for base in kind.__mro__:
            method = vars(base).get(name)
            if isinstance(method, FunctionType) and not is_foreign(method.__module__):
                found.append(method)
    return found


def _parts_of(value: Any, names: bool) -> Iterable[Any]:
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, BuiltinMethodType):
        return (value.__self__,)
    if is_own_function(value):
        return (
            *_closed_over(value),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(_globals_of(value) if names else ()),
        )
    if isinstance(value, dict):
        return tuple(value.values()) if len(value) <= SEARCHED else ()
    if isinstance(value, (list, tuple, set, deque)):
        return tuple(value) if len(value) <= SEARCHED else ()
    return ()


def _globals_of(function: FunctionType) -> Iterator[Any]:
    """Yield the globals that a function uses, and what it uses of the user's Python modules."""
    names, table = names_in(function.__code__)[0], function.__globals__
    for name in names & table.keys():
        value = table[name]
        if not isinstance(value, ModuleType):
            yield value
        elif value.__name__.partition(".")[0] not in FOREIGN:
            yield from (vars(value)[key] for key in names & vars(value).keys())


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that code uses, and those outside of it that it assigns.

    Both include the functions, lambdas and comprehensions inside the code.
    """
    used, stored = set(code.co_names), set[str]()
    if not STORES.isdisjoint(code.co_code[::2]):  # most functions assign nothing outside
        stored |= {s.argval for s in dis.get_instructions(code) if s.opcode in STORES}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_in(constant)
            used |= inner[0]
            stored |= inner[1]
    return frozenset(used), frozenset(stored & {*code.co_freevars, *used})


@lru_cache(maxsize=4096)
def is_foreign(module: str | None) -> bool:
    """Return whether a Python module, given by its name, is of a package in `FOREIGN`."""
    return str(module).partition(".")[0] in FOREIGN


def is_own_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and not is_foreign(value.__module__)


def is_own_class(value: Any) -> bool:
    return isinstance(value, type) and not is_foreign(value.__module__)


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is still empty
            yield cell.cell_contents


def _has_attributes(value: Any) -> bool:
    """Return whether a value is an object of the user's own, whose attributes a loss may change.

    Objects of the standard library and of frameworks (loggers, trainers, configurations) change for
    other reasons.
    """
    if isinstance(value, RECORDS):
        return True
    return (
        (hasattr(value, "__dict__") or bool(_slots(type(value))))
        and not is_foreign(type(value).__module__)
        and not isinstance(value, (nn.Module, type))
    )


def is_generator(value: Any) -> bool:
    return (
        isinstance(value, torch.Generator)
        or hasattr(type(value), "bit_generator")
        or (hasattr(type(value), "getstate") and hasattr(type(value), "setstate"))
        or type(value).__name__ == "RandomState"
    )


# --- Equal values ---


def same_value(before: Any, now: Any) -> bool:
    """Return whether two values are the same object, or equal plain values."""
    if before is now:
        return True
    return type(before) in PLAIN and type(now) is type(before) and bool(before == now)


def holds_same_objects(content: Any, now: Any) -> bool:
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
    return holds_same_objects(item, now) if type(item) in CONTAINERS else same_value(item, now)


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
            yield label, vars(owner), frozenset()
        return
    if isinstance(owner, type):
        yield from class_tables([owner], seen)
        return
    if isinstance(owner, ITEMS):
        if id(owner) not in seen:
            seen.add(id(owner))
            yield label, ItemValues(owner), frozenset()
            if hasattr(owner, "__dict__"):
                yield label, vars(owner), frozenset()
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
            yield from scripted_tables(part, name)
            yield from class_tables([type(part)], seen)


def scripted_tables(module: nn.Module, label: str) -> Iterator[Table]:
    """Yield the attributes that a scripted module (`torch.jit.script`) keeps outside of Python."""
    if isinstance(module, torch.jit.ScriptModule) and "_concrete_type" in vars(module):
        yield label, ScriptedValues(module), frozenset()


def class_tables(kinds: Iterable[type], seen: set[int]) -> Iterator[Table]:
    """Yield the attributes of the user's own classes and their base classes, each once."""
    for kind in kinds:
        if not is_foreign(kind.__module__):
            for base in kind.__mro__:
                if id(base) not in seen and not is_foreign(base.__module__):
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
        return len([*iter(self)])  # list(self) would ask for the length


class PlainValues(_View):
    """The numbers, texts and None among the attributes of an object.

    Attributes that only classes of a framework assign and no code of the user mentions are omitted:
    they count steps and the like.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self._omitted = _assigned_by_frameworks(type(owner))

    @override
    def __iter__(self) -> Iterator[str]:
        return (
            key
            for key, value in vars(self._owner).items()
            if type(value) in PLAIN and key not in self._omitted
        )


def _assigned_by_frameworks(kind: type) -> set[str]:
    """Return the attributes that foreign base classes assign and the other classes never name."""
    assigned, named = set[str](), set[str]()
    for base in kind.__mro__:
        for function in vars(base).values():
            code = getattr(inspect.unwrap(function), "__code__", None)
            if not isinstance(code, CodeType):
                continue
            if not is_foreign(base.__module__):
                named |= names_in(code)[0]
            elif base.__module__ not in ("builtins", "typing"):
                assigned |= _assigned_attributes(code)
    return assigned - named


@lru_cache(maxsize=4096)
def _assigned_attributes(code: CodeType) -> frozenset[str]:
    """Return the attributes of any object that code assigns."""
    return frozenset(s.argval for s in dis.get_instructions(code) if s.opname == "STORE_ATTR")


class _FunctionValues(_View):
    """The outer names that a function can assign, or that hold tensors, with their values."""

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function)
        code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        used, stored = names_in(code)
        outer = {*self._cells, *(used & self._globals.keys())}
        tensors = {name for name in outer if isinstance(self.get(name), Tensor)}
        self._names = tensors | (stored & {*self._cells, *used})

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


Added = tuple[Any, int, int]
"""A list, and the positions of the first item that was appended and of the end."""


class ItemValues(_View):
    """The items that a list or a dict holds now; containers among them have tables of their own.

    Later items are not among them: a loss appends to a list to log.
    """

    def __init__(self, container: Any) -> None:
        super().__init__(container)
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        self._every = dict(pairs)
        self._items = {k: v for k, v in self._every.items() if not isinstance(v, (*ITEMS, set))}

    def added(self) -> Added | None:
        """Return what was appended to a list since, or None."""
        if isinstance(self._owner, dict) or len(self._owner) <= len(self._every):
            return None
        return self._owner, len(self._every), len(self._owner)

    @override
    def __getitem__(self, key: Any) -> Any:
        try:
            return self._owner[key]
        except IndexError:
            raise KeyError(key) from None

    @override
    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self._owner, dict):
            while len(self._owner) <= key:  # items were removed
                self._owner.append(self._every[len(self._owner)])
        self._owner[key] = value

    @override
    def __delitem__(self, key: Any) -> None:
        del self._owner[key]

    @override
    def __iter__(self) -> Iterator[Any]:
        return (key for key in self._items if self.get(key, MISSING) is not MISSING)


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


class ScriptedValues(_View):
    """The attributes of a scripted module: numbers, texts, tensors, and containers of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        declared = vars(module)["_concrete_type"].get_attributes()
        self._names = [
            name
            for name in declared
            if name not in STANDARD and name not in module._buffers and name != "training"
        ]
        self._read: dict[str, Any] = {}

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self._names:
            raise KeyError(key)
        value = getattr(self._owner, key)
        if type(value) in CONTAINERS:  # a new copy at each access
            if key not in self._read or not holds_same_objects(self._read[key], value):
                self._read[key] = value
            value = self._read[key]
        return value

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


class _ClassValues(_View):
    """The values of a class that its objects share; methods and the like are omitted."""

    @override
    def __iter__(self) -> Iterator[str]:
        for key, value in vars(self._owner).items():
            if not key.startswith("__") and (type(value) in PLAIN or isinstance(value, TREES)):
                yield key
