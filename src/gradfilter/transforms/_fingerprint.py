"""Describe a chain as text, so that processes can check that they run the same chain."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gradfilter._factory import FactoryCall, MadeByFactory
from gradfilter._types import Transform

DEPTH = 16
SHOWN = 16
"""The largest number of elements of a tensor that are written out."""

START, END = "\x02", "\x03"
"""Marks around the code of functions; text written by repr does not contain them."""

_WHOLE: ContextVar[tuple[Transform, ...]] = ContextVar("whole_chain", default=())


@contextmanager
def initialising(parts: tuple[Transform, ...]) -> Iterator[None]:
    """Let the ``init`` of every transform inside find the outermost chain that it belongs to."""
    if _WHOLE.get():
        yield
        return
    token = _WHOLE.set(parts)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def whole_chain() -> tuple[Transform, ...]:
    """Return the transforms of the outermost chain whose ``init`` runs; () if there is none."""
    return _WHOLE.get()


def described(thing: Any) -> str:
    """Describe a transform by the call that made it, with all arguments that are not defaults.

    Numbers, strings, their containers and the arguments of this library's transforms are written
    out. Functions are described by their code and their closures, other objects by their type only,
    because processes cannot compare them.
    """
    return _canonical_text(thing, 0)


def _canonical_text(value: Any, depth: int) -> str:
    if depth > DEPTH:
        return "..."
    deeper = depth + 1
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, Tensor):
        few = value.device.type != "meta" and value.numel() <= SHOWN
        return str(value.detach().tolist()) if few else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, MadeByFactory):
        return _of_call(value, deeper)
    if isinstance(value, types.FunctionType):
        return _of_function(value, deeper)
    if isinstance(value, partial):
        held = (value.func, *value.args, *([value.keywords] if value.keywords else []))
        return f"partial({', '.join(_canonical_text(part, deeper) for part in held)})"
    if isinstance(value, types.MethodType):
        return f"{_canonical_text(value.__self__, deeper)}.{value.__name__}"
    if is_dataclass(value) and not isinstance(value, type) and _holds_arguments(value):
        named = (
            f"{f.name}={_canonical_text(getattr(value, f.name), deeper)}" for f in fields(value)
        )
        return f"{type(value).__qualname__}({', '.join(named)})"
    if isinstance(value, Mapping):
        pairs = (
            f"{_canonical_text(k, deeper)}: {_canonical_text(v, deeper)}" for k, v in value.items()
        )
        return "{" + ", ".join(sorted(pairs)) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_canonical_text(item, deeper) for item in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_canonical_text(item, deeper) for item in value) + ")"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__name__


def _holds_arguments(value: Any) -> bool:
    """Return whether a dataclass of this library holds the arguments of a transform."""
    own = type(value).__module__.partition(".")[0] == "gradfilter"
    return own and bool(value.__dataclass_params__.frozen)


def _of_call(value: Any, depth: int) -> str:
    call: FactoryCall | None = value.call
    if call is None:  # written without a factory, or changed since
        functions = " ".join(_canonical_text(part, depth) for part in value.core)
        return f"{type(value).__name__}({functions})"
    bound = call.bound()
    given = []
    for name, argument in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        kind, default = parameter.kind, _canonical_text(parameter.default, depth)
        if kind is inspect.Parameter.VAR_POSITIONAL:
            given += [_canonical_text(item, depth) for item in argument]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            given += [f"{key}={_canonical_text(argument[key], depth)}" for key in sorted(argument)]
        elif (text := _canonical_text(argument, depth)) != default:
            given.append(f"{name}={text}")
    return f"{call.factory.__name__}({', '.join(given)})"


def _of_function(function: types.FunctionType, depth: int) -> str:
    """Describe a function by name, code, defaults and closure; one of a module by its name."""
    function = inspect.unwrap(function)
    if function.__closure__ is None and _importable(function):
        return function.__qualname__
    named = function.__qualname__.replace("<locals>.", "").replace("<lambda>", "lambda")
    code, cells = function.__code__, function.__closure__ or ()
    held = []
    for name, cell in sorted(zip(code.co_freevars, cells, strict=True), key=lambda pair: pair[0]):
        try:
            content = cell.cell_contents
        except ValueError:  # the cell is still empty
            continue
        held.append(
            f"{name}={'itself' if content is function else _canonical_text(content, depth)}"
        )
    held += [_canonical_text(default, depth) for default in function.__defaults__ or ()]
    return f"{named}[{', '.join(held)}]{_of_code(code)}"


def _importable(function: types.FunctionType) -> bool:
    return function.__module__ != "__main__" and "<" not in function.__qualname__


def _of_code(code: types.CodeType) -> str:
    """Describe the code of a function that has no importable name."""
    consts = [
        _of_code(const) if isinstance(const, types.CodeType) else repr(const)
        for const in code.co_consts
        if not isinstance(const, frozenset)
    ]
    return f"{START}{code.co_code.hex()} {' '.join(consts)} {' '.join(code.co_names)}{END}"


def shortened(text: str) -> str:
    """Remove the code of functions from a description, for readers."""
    found, depth = [], 0
    for letter in text:
        depth += (letter == START) - (letter == END)
        if not depth and letter != END:
            found.append(letter)
    return "".join(found)
