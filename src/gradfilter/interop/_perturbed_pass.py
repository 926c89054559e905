"""Two passes of an ordinary closure, the second at perturbed parameters, in place and undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradfilter._types import Transform
from gradfilter.grads._ambient import random_state, random_state_restored, set_random_state
from gradfilter.grads._attributes import Attributes
from gradfilter.grads._host_random import HostRandom

Buffers = dict[tuple[nn.Module, str], tuple[Tensor | None, Tensor | None]]  # object, its values


class SameSurroundings:
    """Random numbers and buffers of a first pass, to run a second one in them.

    The second pass draws the numbers of the first (dropout masks) and starts from the buffers the
    first started from; what it draws and writes is forgotten.

    Args:
        device: Whose generator is kept, beside the CPU's.
        model: Whose buffers are kept; None for those of every module that the first pass calls.
    """

    def __init__(self, device: torch.device, model: nn.Module | None) -> None:
        self._device, self._model = device, model
        self._random = random_state(device)
        # The modules' own generators are those that the first pass finds.
        self._host = HostRandom(
            [] if model is None else Attributes(dict(model.named_modules())).generators
        )
        self._buffers: Buffers = {}
        self._found: dict[nn.Module, HostRandom] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first pass."""
        if self._model is not None:
            self._note(self._model)
            yield
            return
        hook = register_module_forward_pre_hook(lambda module, arguments: self._note(module))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Around the second pass."""
        modules = dict.fromkeys(module for module, _ in self._buffers)
        after: Buffers = {}
        for module in modules:
            after |= _buffers(module)
        hosts = [self._host, *self._found.values()]
        present = [host.present() for host in hosts]
        with random_state_restored(self._device):
            try:
                # Of a generator that several hold, the earliest note is from before it drew.
                for host in reversed(hosts):
                    host.restore()
                set_random_state(self._random, self._device)
                _restore(self._buffers)
                yield
            finally:
                for host in present:
                    host.restore()
                _restore(after)

    def _note(self, module: nn.Module) -> None:
        # A module that runs twice has other buffers by then: the first note counts.
        for part in module.modules():
            self._buffers = _buffers(part) | self._buffers
            if self._model is None and part not in self._found:
                self._found[part] = HostRandom(Attributes({"": part}).generators, everywhere=False)


def _buffers(module: nn.Module) -> Buffers:
    own = module._buffers.items()  # named_buffers leaves None out, and shared ones
    return {(module, name): (b, None if b is None else b.detach().clone()) for name, b in own}


def _restore(buffers: Buffers) -> None:
    with torch.no_grad():
        for (module, name), (buffer, values) in buffers.items():
            if buffer is not None and values is not None:
                buffer.copy_(values)
            # A module may have put another tensor in its place.
            if module._buffers.get(name) is not buffer:
                setattr(module, name, buffer)


def transform_gradients(
    transform: Transform, params: list[Tensor], second_pass: Callable[[], None]
) -> None:
    """Replace every ``p.grad`` by what a chain with `sam_perturb` makes of it.

    Parameters without a gradient are neither perturbed nor given one. The others are back where
    they were, bit for bit, when this returns or raises: copied, never recomputed.

    Args:
        transform: A link or chain of kind ``tree -> tree`` that asks for ``grad_fn``.
        params: Each with the gradient of the first pass, or none.
        second_pass: Leaves the gradients at the present parameters in ``p.grad``.
    """
    used = {str(i): p for i, p in enumerate(params) if p.grad is not None}
    if not used:
        return
    old = {name: p.detach().clone() for name, p in used.items()}
    # A copy: p.grad may be a view of a bucket that the second pass writes to.
    grads = {name: p.grad.clone() for name, p in used.items() if p.grad is not None}
    if any(g.layout != torch.strided for g in grads.values()):
        raise ValueError("Expected dense gradients, found a sparse one. Use sparse=False.")

    def grad_fn(near: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            _put(used, near)
            second_pass()
        finally:
            _put(used, old)
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in used.items()}

    with torch.no_grad():
        found, _, _ = transform.update(grads, transform.init(old), old, grad_fn=grad_fn)
    for i, p in enumerate(params):
        p.grad = found.get(str(i))


def _put(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[name])
    # An autocast around both passes would go on with half-precision copies of the old values.
    torch.clear_autocast_cache()
