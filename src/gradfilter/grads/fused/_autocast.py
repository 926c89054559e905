"""Apply autocast to operations that vmap decomposes before autocast sees them.

Autocast acts on operations: a matrix product runs in half precision, a loss in float32. vmap
replaces some operations by several others. Autocast treats those differently, and the result has
another dtype or precision than outside of vmap. So the operands are cast here, following torch's
own lists, and autocast is disabled for the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads.fused._lift import autocast_any, autocast_dtype, autocast_names
from gradfilter.grads.fused.overrides._spellings import spellings

Function = Callable[..., Any]

LOW = {
    *("addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "mm", "mv"),
    *("chain_matmul", "conv1d", "conv2d", "conv3d", "conv_tbc", "convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linalg_multi_dot"),
    *("gru_cell", "linalg_vecdot", "linear", "lstm_cell", "matmul", "prelu", "rnn_relu_cell"),
    *("rnn_tanh_cell", "scaled_dot_product_attention"),
}
"""Operations that autocast runs in half precision, on devices where it knows them."""

WIDEST = {"dot", "vdot"}
"""Operations that autocast runs in the widest dtype among the operands."""

BUILT_IN = {
    *("addcdiv", "addcmul", "atan2", "bilinear", "cat", "cross", "index_copy", "index_put"),
    *("scatter_add", "stack", "tensordot"),
    *("_addmm_activation", "_convolution", "_cudnn_rnn"),
    *("_native_multi_head_attention", "mkldnn_rnn_layer"),
    *("_scaled_dot_product_flash_attention", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"),
    *("cudnn_convolution", "cudnn_convolution_transpose"),
    "grid_sampler",
}
"""Operations that autocast knows and that vmap does not decompose."""

UNKNOWN = {"addmv", "addr", "dot", "mv", "vdot"}
"""Operations that vmap turns into matrix products; not cast where autocast does not know them."""

LIKE_INPUT = {"batch_norm", "group_norm", "instance_norm", "layer_norm"}
"""Operations whose result has the dtype of the first operand if autocast does not know them."""

FULL = {"inner", "tensordot"}
"""Operations that are a `dot` (autocast may not know it) or a matrix product, by their shapes."""

PIECES = ("linear_cross_entropy", "native_group_norm", "native_layer_norm")
"""Operations that vmap decomposes into parts of which autocast casts only some."""

OTHER_NAMES = {"cross_entropy_loss": F.cross_entropy}


def under_autocast(function: Function) -> Function:
    """Return the function, which casts its operands as autocast would outside of vmap."""
    if not autocast_any():
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensor = next((a for a in _tree.leaves((args, kwargs)) if isinstance(a, Tensor)), None)
        dtype = None if tensor is None else autocast_dtype(tensor.device)
        if tensor is None or dtype is None:
            return function(*args, **kwargs)
        treat = _treatments(tensor.device.type).get(function)
        return function(*args, **kwargs) if treat is None else treat(function, dtype, args, kwargs)

    return run


@functools.cache
def _treatments(device: str) -> dict[Function, Callable[..., Any]]:
    known = autocast_names(device)
    found: dict[Function, Callable[..., Any]] = {}
    for name in known - BUILT_IN:
        if name == "binary_cross_entropy" and device != "cpu":
            continue  # autocast refuses it on accelerators
        treat = (
            _call_in_autocast_dtype
            if name in LOW
            else _call_in_widest_dtype
            if name in WIDEST
            else _call_in_float32
        )
        found |= dict.fromkeys(_all_spellings(name), treat)
    for name in UNKNOWN - known:
        found |= dict.fromkeys(_all_spellings(name), _call_without_autocast)
    for name in LIKE_INPUT - known:
        found |= dict.fromkeys(_all_spellings(name), _call_like_first)
    for name in FULL - known:
        found |= dict.fromkeys(_all_spellings(name), _call_contraction)
    if "adaptive_avg_pool3d" in known:
        found[F.interpolate] = _interpolate
    for name in PIECES:
        found |= dict.fromkeys(_all_spellings(name), _refuse_mixed)
    return found


def _all_spellings(name: str) -> list[Function]:
    if not hasattr(torch.ops.aten, name):  # a function of several operations, or not in this torch
        return [getattr(F, name)] if hasattr(F, name) else []
    linalg, fft = getattr(torch._C, "_linalg", F), getattr(torch._C, "_fft", F)
    homes = [home for home in (F, linalg, fft) if hasattr(home, name)]
    more = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
    return [*spellings(name), *(getattr(home, name) for home in homes), *more]


def _cast(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    """Cast the tensors that autocast casts: floating point, but not float64."""
    return _tree.tree_map(
        lambda t: (
            cast(t)
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
            else t
        ),
        value,
    )


def _call_in_autocast_dtype(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    return _call_without_autocast(function, dtype, *_cast((args, kwargs), lambda t: t.to(dtype)))


def _call_in_float32(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    return _call_without_autocast(function, dtype, *_cast((args, kwargs), _tree.at_least_float32))


def _call_in_widest_dtype(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    dtypes = [t.dtype for t in _tree.leaves((args, kwargs)) if isinstance(t, Tensor)]
    widest = functools.reduce(torch.promote_types, dtypes)
    return _call_without_autocast(function, dtype, *_cast((args, kwargs), lambda t: t.to(widest)))


def _call_without_autocast(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    device = next(a for a in _tree.leaves((args, kwargs)) if isinstance(a, Tensor)).device.type
    with torch.autocast(device, enabled=False):
        return function(*args, **kwargs)


def _call_like_first(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    first = args[0] if args else kwargs["input"]
    dtypes = {t.dtype for t in _tree.leaves((args, kwargs)) if isinstance(t, Tensor)}
    if len(dtypes) == 1:
        return function(*args, **kwargs)
    return _call_in_float32(function, dtype, args, kwargs).to(first.dtype)


def _call_contraction(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    given: list[Any] = [*args, *kwargs.values()]
    given.append(2)  # the default
    a, b, count = given[:3]
    if isinstance(count, (list, tuple)):
        count = len(count[0]) if isinstance(count[0], (list, tuple)) else len(count)
    inner = function.__name__.startswith("inner")
    whole = a.ndim <= 1 and b.ndim <= 1 if inner else a.ndim == b.ndim == count
    return (_call_without_autocast if whole else _call_unchanged)(function, dtype, args, kwargs)


def _call_unchanged(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _interpolate(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    area = kwargs.get("mode", args[3] if len(args) > 3 else "nearest") == "area"
    return (_call_in_float32 if area and x.ndim == 5 else _call_unchanged)(
        function, dtype, args, kwargs
    )


def _refuse_mixed(function: Function, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    tensors = [t for t in _tree.leaves((args, kwargs)) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if len(dtypes) > 1 or function is getattr(F, "linear_cross_entropy", None):
        raise RuntimeError(
            f"{function.__name__} under autocast cannot run over all rows at once: vmap takes it "
            "to pieces, some of which would be cast."
        )
    return function(*args, **kwargs)
