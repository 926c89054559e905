"""Find the tensors that a function writes into, before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from torch.overrides import TorchFunctionMode
from typing_extensions import override


def tensor_property(name: str) -> Any:
    """Return a property of `torch.Tensor` itself; function modes get its getter."""
    return getattr(torch.Tensor, name)  # torch's stubs give the type of its value


_ARITHMETIC = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul")
_BITS = ("and", "or", "xor", "lshift", "rshift")
_OPERATORS = {f"__i{name}__" for name in (*_ARITHMETIC, *_BITS)}
_SET_DATA = tensor_property("data").__set__
_HARMLESS = {"requires_grad_", "rename_", "share_memory_"}


def _in_place_argument(function: Any) -> tuple[Any, int] | None:
    code = getattr(function, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return None
    return function, list(inspect.signature(function).parameters).index("inplace")


_OPTIONAL: dict[Callable[..., Any], int] = dict(
    filter(None, map(_in_place_argument, vars(F).values()))
)
"""Functions with an argument ``inplace``, and its position."""


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """Return the tensors that a call would write into."""
    if may_write(func) or (kwargs and "out" in kwargs):
        return written_by(func, args, kwargs)
    return ()


@lru_cache(4096)
def may_write(func: Any) -> bool:
    """Return whether a function can write into an argument other than ``out``."""
    name = getattr(func, "__name__", "")
    if func in _OPTIONAL or name in _OPERATORS or name in ("__set__", "__setitem__"):
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _HARMLESS


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that a call of a function that may write would write into."""
    out = kwargs.get("out")
    if out is not None:
        yield from _tensors(out)
    place = _OPTIONAL.get(func)
    if place is not None:
        chosen = args[place] if len(args) > place else kwargs.get("inplace", False)
        if chosen:
            yield from _tensors(args[0] if args else kwargs.get("input"))
    elif args and may_write(func):
        sets = getattr(func, "__name__", "") == "__set__"
        if not sets or (func == _SET_DATA and not _is_same(*args)):  # nn.Module.to, of routers
            yield from _tensors(args[0])


class WriteWatch(TorchFunctionMode):
    """Refuse a function that is about to write into guarded tensors.

    Args:
        guarded: Pairs of a name and a tensor.
        refuse: Makes the error from the name.

    Attributes:
        hook_methods: The methods that registered hooks on tensors.
    """

    def __init__(
        self, guarded: Iterable[tuple[str, Tensor]], refuse: Callable[[str], Exception]
    ) -> None:
        super().__init__()
        self._guarded = {memory(tensor): name for name, tensor in guarded}
        self._guarded.pop(0, None)  # the address of tensors without elements
        self._refuse = refuse
        self.hook_methods: set[str] = set()

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Check the tensors that the function would write into, and run it."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a traced tensor has no memory yet
            return func(*args, **kwargs)
        if func is torch.Tensor.register_hook:
            self.hook_methods.add("register_hook")
        for tensor in written(func, args, kwargs):
            name = self._guarded.get(memory(tensor))
            if name is not None:
                raise self._refuse(name)
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else ()


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values except for their dtype."""
    if any(map(_functorch.is_functorch_wrapped_tensor, (tensor, other))):
        return tensor is other
    if tensor.shape != other.shape or tensor.device != other.device:
        return False
    if tensor.dtype != other.dtype:
        with torch._C.DisableTorchFunction():
            return torch.equal(tensor.detach().to(other.dtype), other.detach())
    return tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()


def memory(tensor: Tensor) -> int:
    """Return a number for a tensor's memory, also for its views and at any functorch level.

    It is the address, or that of the storage for a tensor without memory: meta, or fake in a trace.
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
