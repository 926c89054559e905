"""BatchNorm of one image on a CPU, whose backward kernel may take one memory format for another.

The strides of one image (1, C, H, W) leave its format open: the first may be any number. What came
from tokens, (1, H W, C) transposed and unfolded, counts as channels last by one of torch's tests
and as contiguous by another. Where input and gradient differ in that, torch 2.11 to 2.15 return
gradients that are wrong altogether, in any plain backward pass. So here neither is left open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradfilter.grads._batch import Batch
from gradfilter.grads.fused.overrides._spellings import spellings


def straight(x: Tensor) -> Tensor:
    """One image with the strides of its format; anything else as it is."""
    if x.ndim < 4 or x.shape[0] != 1 or x.is_contiguous() or x.stride(0) == x[0].numel():
        return x
    return x.contiguous()


def _straightened(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if x.ndim < 4 or x.shape[0] != 1 or x.device.type != "cpu":
        return function(*args, **kwargs)
    if args:
        args = (straight(x), *args[1:])
    else:
        kwargs = {**kwargs, "input": straight(x)}
    found = function(*args, **kwargs)
    y = found if isinstance(found, Tensor) else found[0]
    if y.requires_grad:
        y.register_hook(straight)
    return found


NORMS: list[Callable[..., Any]] = [
    *(F.batch_norm, F.instance_norm),
    *(f for name in ("batch_norm", "instance_norm", "native_batch_norm") for f in spellings(name)),
]

STRAIGHTENED: dict[Callable[..., Any], Callable[..., Any]] = {
    function: functools.partial(_straightened, function) for function in NORMS
}
"""What is run instead of each function."""


class _Straighten(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return STRAIGHTENED.get(func, func)(*args, **(kwargs or {}))


def one_image(batch: Batch, modules: Mapping[str, nn.Module]) -> AbstractContextManager[Any]:
    """A context for passes over single samples on a CPU, forward and backward.

    It costs every call of torch a few microseconds: models without such a layer go without.
    """
    first = batch.tensors[0]
    if first.shape[1] > 1 or first.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    normalises = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in modules.values())
    return _Straighten() if normalises or not modules else nullcontext()
