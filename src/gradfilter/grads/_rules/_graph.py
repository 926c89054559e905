"""Questions to autograd inside a pass over all rows: a row's tensor answers as it would alone.

To torch, the row's view of a tensor has no graph: that belongs to the tensor of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from gradfilter.grads._autocast import under_autocast
from gradfilter.grads._loop import hooked_parameter
from gradfilter.grads._rules._host import Host, Rule
from gradfilter.grads._writes import tensor_property


class RowNode:
    """What ``grad_fn`` is to a row: the node of all rows, without a way to hook on it."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        """Everything else as the node has it."""
        if name in ("register_hook", "register_prehook"):
            raise RuntimeError(
                f"grad_fn.{name} cannot run over all rows at once: use the tensor's own "
                'register_hook, or plan="loop"'
            )
        return getattr(self._node, name)


def _answer(read: Callable[[Tensor], Any]) -> Rule:
    def rule(host: Host, tensor: Tensor, *_: Any) -> Any:
        if not host.level.batched(tensor):
            return NotImplemented
        return host.level.aside(read, _functorch.get_unwrapped(tensor))

    return rule


def _node(tensor: Tensor) -> RowNode | None:
    return None if tensor.grad_fn is None else RowNode(tensor.grad_fn)


def _require_grad(host: Host, tensor: Tensor, requires_grad: bool = True) -> Any:
    """`torch.Tensor.requires_grad_` and its attribute."""
    if not host.level.batched(tensor):
        return NotImplemented
    rows = _functorch.get_unwrapped(tensor)
    host.level.aside(rows.requires_grad_, requires_grad)
    return tensor


def _register_hook(host: Host, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    """`torch.Tensor.register_hook`: the hook sees the gradient of a row."""
    if not host.level.batched(tensor):
        return NotImplemented
    rows = _functorch.get_unwrapped(tensor)
    for name, leaf in host.tape.leaves.items():
        if leaf is rows:
            raise hooked_parameter(name)
    place = _functorch.maybe_get_bdim(tensor)
    # What is not linear in the gradient must see that of every row as it is.
    host.tape.linear = False

    def on_rows(grad: Tensor) -> Tensor | None:
        def run() -> Any:
            with torch.no_grad():
                row = _functorch._add_batch_dim(grad, place, host.level.number)
                found = hook(row)
                return None if found is None else host.level.lower(found)

        found = host.again(run)
        if found is None:
            return None
        changed: Tensor = found.movedim(0, place).to(grad.dtype)
        return changed

    return host.level.aside(rows.register_hook, on_rows)


def _refused(name: str) -> Rule:
    def rule(host: Host, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name} inside the loss cannot run over all rows at once: the graph is that of all "
            'rows. Use plan="loop"'
        )

    return rule


def _linear_cross_entropy(host: Host, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """`torch.nn.functional.linear_cross_entropy`: in chunks it asks what requires a gradient."""
    function: Any = under_autocast(F.linear_cross_entropy)
    return NotImplemented if options is None else function(*args, options=None, **kwargs)


def _set(host: Host, tensor: Tensor, value: bool) -> Any:
    found = _require_grad(host, tensor, value)
    return NotImplemented if found is NotImplemented else None


GRAPH: dict[Callable[..., Any], Rule] = {
    tensor_property("requires_grad").__get__: _answer(lambda t: t.requires_grad),
    tensor_property("is_leaf").__get__: _answer(lambda t: t.is_leaf),
    tensor_property("grad_fn").__get__: _answer(_node),
    tensor_property("requires_grad").__set__: _set,
    torch.Tensor.requires_grad_: _require_grad,
    torch.Tensor.register_hook: _register_hook,
    torch.Tensor.register_post_accumulate_grad_hook: _refused("register_post_accumulate_grad_hook"),
    torch.Tensor.retain_grad: _refused("retain_grad"),
    torch.Tensor.backward: _refused("backward"),
    torch.autograd.backward: _refused("torch.autograd.backward"),
    torch.autograd.grad: _refused("torch.autograd.grad"),
}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    GRAPH[F.linear_cross_entropy] = _linear_cross_entropy
