"""Find the values outside of its arguments that a function of the user reads.

A trace fixes them. They are globals and attributes of Python modules, what functions close over,
their defaults, the keywords of partials, context variables, and the settings of optimizers.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._state_owners import (
    FOREIGN,
    MISSING,
    STANDARD,
    is_own_class,
    is_own_function,
    names_in,
    same_value,
    values_in,
)

GLOBAL_READS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
"""The instructions by which a function reads a global name."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A value that a function reads, as it was when it was recorded.

    Attributes:
        name: The name in warnings.
        get: Returns the present value; `MISSING` if there is none.
        value: The value then.
    """

    name: str
    get: Callable[[], Any]
    value: Any

    def has_changed(self) -> bool:
        """Return whether the name has another value now."""
        return not same_value(self.value, self.get())


@dataclass(frozen=True, eq=False)
class ReadValues:
    """The values that functions read, and the modules that they may call.

    Attributes:
        readings: The values.
        modules: The modules, each once.
    """

    readings: tuple[Reading, ...]
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, roots: Iterable[Any]) -> ReadValues:
        """Search the roots, and all that their functions, objects and modules refer to."""
        found: dict[int, Any] = {}
        waiting = list(roots)
        while waiting:
            for value in values_in(waiting.pop(), names=True):
                if id(value) not in found:
                    found[id(value)] = value
                    waiting.extend(_inside(value))
        readings = [reading for value in found.values() for reading in _readings(value)]
        modules = [value for value in found.values() if isinstance(value, nn.Module)]
        return cls(tuple(readings), tuple(modules))

    def changed(self) -> str | None:
        """Return the name of a value that has changed, or None."""
        return next((r.name for r in self.readings if r.has_changed()), None)


def roots_of(loss: NormalizedLoss) -> Iterator[Any]:
    """Yield the functions and objects from which the search in a loss begins."""
    yield from loss.modules.values()
    criterion = getattr(loss.loss, "criterion", loss.loss)
    yield criterion
    if type(criterion).__module__.partition(".")[0] == "gradfilter":  # the criterion of a host
        yield from vars(criterion).values() if hasattr(criterion, "__dict__") else ()


def _inside(value: Any) -> Iterator[Any]:
    """Yield the methods of the user's classes, and the attributes of objects and modules."""
    if isinstance(value, nn.Module):
        yield from value._modules.values()
        yield from (item for key, item in vars(value).items() if key not in STANDARD)
        for hooks in (value._forward_hooks, value._forward_pre_hooks, value._backward_hooks):
            yield from hooks.values()
    elif is_own_class(type(value)):
        yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        if is_own_class(kind):
            yield from (item for item in vars(kind).values() if isinstance(item, FunctionType))


def _readings(value: Any) -> Iterator[Reading]:
    if isinstance(value, partial):
        yield _reading("an argument", lambda: value.args)
        for key in value.keywords:
            yield _reading(key, partial(value.keywords.get, key, MISSING))
    elif isinstance(value, ContextVar):
        yield _reading(value.name, partial(value.get, MISSING))
    elif isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            for key in group.keys() - {"params", "param_names"}:
                yield _reading(key, partial(group.get, key, MISSING))
    elif isinstance(value, FunctionType) and is_own_function(value):
        yield from _readings_of(value)


def _readings_of(function: FunctionType) -> Iterator[Reading]:
    yield _reading("a default", lambda: function.__defaults__)
    for key in function.__kwdefaults__ or {}:
        yield _reading(key, partial(_keyword_default, function, key))
    table, code = function.__globals__, function.__code__
    gets: dict[str, Callable[[], Any]] = {
        name: partial(table.get, name, MISSING) for name in _globals_read(code) & table.keys()
    }
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    gets |= {name: partial(_content, cell) for name, cell in cells}
    for name, get in gets.items():
        module = get()
        if not isinstance(module, ModuleType):
            yield _reading(name, get)
        elif module.__name__.partition(".")[0] not in FOREIGN:
            for key in names_in(code)[0] & vars(module).keys():
                yield _reading(f"{name}.{key}", partial(vars(module).get, key, MISSING))


def _reading(name: str, get: Callable[[], Any]) -> Reading:
    return Reading(name, get, get())


def _keyword_default(function: FunctionType, key: str) -> Any:
    return (function.__kwdefaults__ or {}).get(key, MISSING)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return MISSING


@lru_cache(maxsize=4096)
def _globals_read(code: CodeType) -> frozenset[str]:
    """Return the global names that code reads, with the functions inside it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in GLOBAL_READS}
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(names.union(*map(_globals_read, nested)))
