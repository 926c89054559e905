"""Correct BatchNorm of one image on a CPU, whose backward kernel may confuse memory formats.

The strides of one image (1, C, H, W) do not determine its format, because the first may be any
number. An image made from tokens, (1, H W, C) transposed and unfolded, is channels last by one of
torch's tests and contiguous by another. If input and gradient differ in this, torch 2.11 to 2.15
return completely wrong gradients in any plain backward pass. So both get unambiguous strides here.
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
from typing_extensions import override

from gradfilter.grads._batch import Batch
from gradfilter.grads.fused.overrides._spellings import spellings


def straight(x: Tensor) -> Tensor:
    """Return one image with the strides of its format; return other tensors unchanged."""
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
"""The replacement of each function."""


class _Straighten(TorchFunctionMode):
    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        function = STRAIGHTENED.get(func)
        return (func if function is None else function)(*args, **(kwargs or {}))


def one_image(batch: Batch, modules: Mapping[str, nn.Module]) -> AbstractContextManager[Any]:
    """Return a context for passes over single samples on a CPU, forward and backward.

    It costs a few microseconds per call of torch, so models without such a layer do not use it.
    """
    first = batch.tensors[0]
    if first.shape[1] > 1 or first.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    normalises = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in modules.values())
    return _Straighten() if normalises or not modules else nullcontext()
