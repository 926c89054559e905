"""Decide whether the values of a tensor may be read on the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, maybe_current_level


def readable(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting and without side effects.

    This holds on a CPU, where reading a few numbers is faster than any operation on them, if no
    autograd, compiler, tracer, torch.func transform or dispatch mode follows the operations.
    """
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not followed()
        and not torch._C._len_torch_dispatch_stack()
    )


def followed() -> bool:
    """Return whether a compiler, tracer or ``torch.func`` transform follows the operations."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return maybe_current_level() is not None


def differentiated() -> bool:
    """Return whether a transform of ``torch.func`` such as grad or jvp takes derivatives.

    A compiler cannot tell.
    """
    if not transformed():
        return False
    derivatives = (TransformType.Grad, TransformType.Jvp)
    return any(level.key() in derivatives for level in get_interpreter_stack() or ())


def transformed() -> bool:
    """Return whether a transform of ``torch.func``, such as vmap, follows the operations.

    A compiler cannot tell.
    """
    if torch.compiler.is_compiling():
        return False
    return maybe_current_level() is not None
