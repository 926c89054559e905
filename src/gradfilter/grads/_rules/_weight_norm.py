"""Weight normalisation: one weight for all rows, its gradient taken apart row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._rules._host import Host


def weight_norm(host: Host, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """`torch._weight_norm`, w = g v / ‖v‖, the norm over all dims but one (−1: over all)."""
    weights = host.weights(v, g)
    if weights is None or not host.batched(v, g):
        return NotImplemented
    rows = [host.level.lower(t) for t in (v, g)]
    return host.run("weight_norm", _WeightNorm.apply, *rows, dim)


class _WeightNorm(torch.autograd.Function):
    """∂g = <∂w, v> / ‖v‖ and ∂v = g/‖v‖ (∂w − v <∂w, v> / ‖v‖²), each per unit."""

    @staticmethod
    def forward(ctx: Any, v_rows: Tensor, g_rows: Tensor, dim: int) -> Tensor:
        v, g = v_rows[0], g_rows[0]
        ctx.save_for_backward(v, g)
        ctx.over = [d for d in range(v.ndim) if d != dim % v.ndim or dim == -1]
        weight = torch._weight_norm(v, g, dim)
        return weight.expand(len(v_rows), *weight.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        v, g = (_tree.at_least_float32(t) for t in ctx.saved_tensors)
        norm: Tensor = torch.linalg.vector_norm(v, dim=ctx.over, keepdim=True)
        grad = _tree.at_least_float32(grad)
        along = (grad * v).sum([d + 1 for d in ctx.over], keepdim=True) / norm
        dtype = ctx.saved_tensors[0].dtype
        per_row = (along.to(dtype)).reshape(len(grad), *g.shape)
        return (g / norm * (grad - v / norm * along)).to(dtype), per_row, None
