"""Find the parameters and buffers of a module, and replace them during a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from gradfilter._shards import is_shard_hook, reshard
from gradfilter._types import Tree

Hook = Callable[[Tensor], Tensor | None]

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()
# Threads that compute with one module share only the module, and a lock inside the module would
# prevent copying and pickling it.


def _locks_of(modules: list[nn.Module]) -> list[threading.RLock]:
    """Return one lock per module, in an order that is the same for all threads."""
    with _LOCKS_LOCK:
        found = [
            _LOCKS.get(module) or _LOCKS.setdefault(module, threading.RLock()) for module in modules
        ]
    return sorted(found, key=id)


class Locked(AbstractContextManager[None]):
    """Holds all locks inside the context."""

    def __init__(self, locks: list[threading.RLock]) -> None:
        self._locks = locks
        self._held: list[threading.RLock] = []

    @override
    def __enter__(self) -> None:
        try:
            for lock in self._locks:
                lock.acquire()
                self._held.append(lock)
        except BaseException:  # the user interrupts the wait
            self.__exit__()
            raise

    @override
    def __exit__(self, *error: object) -> None:
        while self._held:
            self._held.pop().release()


@dataclass(frozen=True)
class AttributeView:
    """An attribute of a module that shares memory with a parameter or a buffer.

    It must follow the tensor that replaces the other one during a call, as it follows it outside.

    Attributes:
        attributes: The attributes of the module.
        key: The name of the attribute.
        view: Its value.
        name: The name of the parameter or buffer.
        whole: True if the value is the parameter or buffer itself.
        strides: The strides of the parameter or buffer.
        geometry: Shape and strides of the view, and its offset in the parameter or buffer.
        follows: True if the view was made with a graph, through which gradients go.
    """

    attributes: dict[str, Any]
    key: str
    view: Tensor
    name: str
    whole: bool
    strides: tuple[int, ...]
    geometry: tuple[tuple[int, ...], tuple[int, ...], int]
    follows: bool

    @classmethod
    def find(cls, module: nn.Module, key: str, view: Tensor, name: str, of: Tensor) -> Self:
        """Describe an attribute that shares the memory of a tensor."""
        # Now, because a pass watches which attributes it uses, and would count these questions.
        offset = int(view.storage_offset() - of.storage_offset())
        geometry = tuple(view.shape), view.stride(), offset
        follows = view.grad_fn is not None
        return cls(vars(module), key, view, name, view is of, of.stride(), geometry, follows)

    def of(self, replaced: Tensor) -> Tensor:
        """Return the same view of the tensor that replaces the parameter or buffer."""
        if self.whole:
            return replaced
        if replaced.stride() != self.strides:
            raise ValueError(
                f"Expected {self.name!r} with the strides of the module's own tensor, because "
                f"attribute {self.key!r} is a view of it, found {replaced.stride()} for "
                f"{self.strides}. Make the view in forward."
            )
        shape, strides, offset = self.geometry
        base = replaced if self.follows else replaced.detach()
        return base.as_strided(shape, strides, replaced.storage_offset() + offset)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module once by its name, as ``named_modules`` does in many more calls."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module | None]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module is None or module in seen:
            continue
        if type(module).named_modules is not nn.Module.named_modules:
            return dict(model.named_modules())  # the class has other modules
        seen.add(module)
        found[name] = module
        inner = f"{name}." if name else ""
        for key, part in reversed(module._modules.items()):
            ahead.append((inner + key, part))
    return found


@dataclass(frozen=True)
class ModuleTensors:
    """The places of parameters and buffers in a module, found in one walk through it.

    Attributes:
        canonical: Maps a place to the name under which ``named_parameters`` or ``named_buffers``
            lists its tensor. A tied tensor has several places; a submodule registered under two
            names has its places once.
        holders: Maps a place to the module's dict that holds it, and the key there.
        trainable: The parameters that are not frozen, by those names.
        buffers: The buffers, by those names.
        empty: The buffers registered as None, which a forward pass could fill unnoticed.
        renormalised: The embeddings with max_norm, which a forward pass writes into.
        hooks: The gradient hooks of trainable parameters (``p.register_hook``), by those names.
        views: The attributes that share memory with a parameter or a buffer.
        modules: Every module once, by its name.
        locks: The locks of the modules that hold tensors.
        shard_hooks: The dicts of hooks that hold some by which torch.distributed gathers the
            module's parameters.
    """

    canonical: dict[str, str]
    holders: dict[str, tuple[dict[str, Tensor | None], str]]
    trainable: Tree
    buffers: Tree
    empty: list[tuple[nn.Module, str]]
    renormalised: set[str]
    hooks: dict[str, list[Hook]]
    views: list[AttributeView]
    modules: dict[str, nn.Module]
    locks: list[threading.RLock]
    shard_hooks: list[dict[int, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> ModuleTensors:
        """Return the places of a module."""
        named = modules_of(model)
        holding = [module for module in named.values() if module._parameters or module._buffers]
        locks = _locks_of(holding)
        reshard(named.values())
        with Locked(locks):  # another thread's tensors may be in the places at this moment
            return cls._collect(named, locks)

    @classmethod
    def _collect(cls, named: dict[str, nn.Module], locks: list[threading.RLock]) -> ModuleTensors:
        first: dict[int, str] = {}
        canonical: dict[str, str] = {}
        holders: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        trainable: Tree = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        empty, renormalised = [], set()
        modules = [(f"{prefix}." if prefix else "", m) for prefix, m in named.items()]
        for prefix, module in modules:
            parameters: Any = module._parameters
            has_weight = "weight" in parameters or "weight" in module._buffers
            if has_weight and getattr(module, "max_norm", None) is not None:
                renormalised.add(f"{prefix}weight")
            for key, tensor in parameters.items():
                if tensor is not None:
                    place = prefix + key
                    name = canonical[place] = first.setdefault(id(tensor), place)
                    holders[place] = parameters, key
                    if tensor.requires_grad:
                        trainable[name] = tensor
        for prefix, module in modules:
            for key, buffer in module._buffers.items():
                if buffer is None:
                    empty.append((module, key))
                else:
                    place = prefix + key
                    canonical[place] = first.setdefault(id(buffer), place)
                    holders[place] = module._buffers, key
                    buffers.setdefault(id(buffer), (place, buffer))
        written = {name for place, name in canonical.items() if place in renormalised}
        hooks = _gradient_hooks(trainable)
        own = dict(buffers.values())
        views = list(_views({**trainable, **own}, modules))
        shard_hooks = [
            table
            for module in named.values()
            for table in (module._forward_pre_hooks, module._forward_hooks)
            if table and any(map(is_shard_hook, table.values()))
        ]
        return cls(
            canonical,
            holders,
            trainable,
            own,
            empty,
            written,
            hooks,
            views,
            named,
            locks,
            shard_hooks,
        )

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[Tree]:
        """Replace the module's tensors inside the context.

        No other thread can do the same at that time. The module's own tensors are restored
        afterwards, also after an error. Hooks that would gather sharded parameters do not run,
        because the tensors are whole.

        Args:
            tensors: The tensors by name; places whose name is not given keep their tensor.

        Yields:
            A dict that holds, after the context, the tensors that the module held by name.
        """
        if parametrize._cache_enabled and any(map(parametrize.is_parametrized, self._all())):
            raise RuntimeError(
                "Expected no torch.nn.utils.parametrize.cached() around the computation of "
                "gradients, which would give every row the weights of the first. Open it inside "
                "of the module's forward."
            )
        filled = [(*self.holders[p], name) for p, name in self.canonical.items() if name in tensors]
        views = [
            (view, view.of(tensors[view.name]))
            for view in self.views
            if view.name in tensors and view.attributes.get(view.key) is view.view
        ]
        after: Tree = {}
        own: list[Tensor | None] = []
        untied = None
        with Locked(self.locks), ExitStack() as stack:
            for table in self.shard_hooks:
                stack.enter_context(_without_shard_hooks(table))
            try:
                own = [holder[key] for holder, key, _ in filled]
                for holder, key, name in filled:
                    holder[key] = tensors[name]
                for view, replaced in views:
                    view.attributes[view.key] = replaced
                yield after
            finally:
                # A module may have replaced its tensors.
                for (holder, key, name), tensor in zip(filled, own, strict=False):
                    if key in holder and (found := holder[key]) is not None:
                        untied = untied if after.setdefault(name, found) is found else key
                    holder[key] = tensor
                stale = None
                for view, replaced in views:
                    if view.attributes.get(view.key) is replaced:
                        view.attributes[view.key] = view.view
                        if after.get(view.name) is not tensors[view.name]:
                            stale = view
        if stale is not None:
            raise ValueError(
                f"Expected a forward pass that writes into buffer {stale.name!r}, found it "
                f"replaced by another tensor while attribute {stale.key!r} keeps the old one. "
                f"Write into it (copy_), or store {stale.key!r} as a clone()."
            )
        if untied is not None:
            raise ValueError(
                f"Expected tied tensors to stay tied, found {untied!r} replaced by another tensor "
                "in one of its places in the forward pass. Write into it (copy_), or register a "
                "tensor for each place."
            )

    def _all(self) -> Iterator[nn.Module]:
        return iter(self.modules.values())

    def tables(self) -> list[tuple[dict[str, Any], int]]:
        """Return the dicts in which modules register their parts, and their sizes."""
        found: list[dict[str, Any]] = []
        for module in self.modules.values():
            parts: Any = module._parameters, module._buffers, module._modules
            found.extend(parts)
        return [(table, len(table)) for table in found]

    def still_empty(self) -> list[tuple[nn.Module, str]]:
        """Return the buffers that are None at present, as the user may have filled some since."""
        return [(module, key) for module, key in self.empty if module._buffers.get(key) is None]

    def empty_again(self, empty: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
        """Remove buffers that a forward pass put where there was none."""
        filled = [(module, key) for module, key in empty if module._buffers.get(key) is not None]
        for module, key in filled:
            module._buffers[key] = None
        return filled

    def refuse_new_buffers(self, empty: list[tuple[nn.Module, str]]) -> None:
        """Remove and refuse buffers that a forward pass put where there was none."""
        filled = self.empty_again(empty)
        if filled:
            module, key = filled[0]
            raise ValueError(
                f"Expected a forward pass that keeps the set of buffers, found {key!r} of "
                f"{type(module).__name__} filled in it. Register the buffer with a tensor before "
                "`extract`."
            )


@contextmanager
def _without_shard_hooks(table: dict[int, Any]) -> Iterator[None]:
    """Remove the hooks by which torch.distributed gathers parameters, inside the context."""
    before = dict(table)
    for key, hook in before.items():
        if is_shard_hook(hook):
            del table[key]
    try:
        yield
    finally:
        added = {key: hook for key, hook in table.items() if key not in before}
        kept = {k: hook for k, hook in before.items() if k in table or is_shard_hook(hook)}
        table.clear()
        table.update({**kept, **added})


def remove_new_parts(tables: list[tuple[dict[str, Any], int]]) -> list[str]:
    """Remove tensors, and modules with tensors, registered since `tables`; return their names."""
    taken = []
    for table, count in tables:
        for key in list(table)[count:] if len(table) > count else ():
            part = table[key]
            if not isinstance(part, nn.Module) or [*part.parameters(), *part.buffers()]:
                del table[key]
                taken.append(key)
    return taken


def _views(named: Tree, modules: list[tuple[str, nn.Module]]) -> Iterator[AttributeView]:
    """Find the attributes of modules that share memory with the named tensors."""
    found = [
        (module, key, value)
        for _, module in modules
        if Tensor in map(type, vars(module).values())  # asked of every module in every step
        for key, value in vars(module).items()
        if type(value) is Tensor
    ]
    if found:
        plain = [(name, tensor) for name, tensor in named.items() if _is_plain(tensor)]
        for module, key, view in found:
            if not _is_plain(view):
                continue
            memory, first, last = _extent(view)
            for name, tensor in plain:
                whole, begin, end = _extent(tensor)
                if memory == whole and begin <= first and last <= end:
                    yield AttributeView.find(module, key, view, name, tensor)
                    break  # a view of several of them follows none


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _extent(tensor: Tensor) -> tuple[int, int, int]:
    """Return the memory of a tensor, and the places of its first and last number in it."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((size - 1) * stride for size, stride in steps)
    return tensor.untyped_storage()._cdata, first, int(last)


def _gradient_hooks(trainable: Tree) -> dict[str, list[Hook]]:
    """Return the hooks that the user registered on the module's own parameters."""
    return {n: list(p._backward_hooks.values()) for n, p in trainable.items() if p._backward_hooks}


def apply_hooks(rows: Tensor, hooks: list[Hook]) -> Tensor:
    """Apply the hooks of a parameter to its gradient in every row. (M, *shape)."""
    found = []
    for row in rows.unbind():
        for hook in hooks:
            changed = hook(row)
            row = row if changed is None else changed
        found.append(row)
    return torch.stack(found).to(rows.dtype)
