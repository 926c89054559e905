"""Whether the numbers in a tensor may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack


def readable(tensor: Tensor) -> bool:
    """Whether reading a tensor's numbers waits for nothing and hides nothing.

    So it is on a CPU, where a few numbers are had sooner than any operation on them, as long as
    nobody follows the operations: no autograd, no compiler or tracer, no transform, no dispatch
    mode.
    """
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not followed()
        and not torch._C._len_torch_dispatch_stack()
    )


def followed() -> bool:
    """Whether a compiler, a tracer or a transform of ``torch.func`` follows the operations."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or transformed()


def differentiated() -> bool:
    """Whether a transform of ``torch.func`` such as grad or jvp takes derivatives.

    Unknown to a compiler.
    """
    if not transformed():
        return False
    derivatives = (TransformType.Grad, TransformType.Jvp)
    return any(level.key() in derivatives for level in get_interpreter_stack() or ())


def transformed() -> bool:
    """Whether a transform of ``torch.func``, such as vmap, follows the operations.

    Unknown to a compiler, for which operations are what they are.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None
