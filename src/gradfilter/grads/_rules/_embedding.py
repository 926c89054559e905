"""Embeddings: one lookup over all rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._embedding_factor import EmbeddingFactor
from gradfilter.grads._factor import ghost_flops
from gradfilter.grads._rules._host import Host, rows_of
from gradfilter.grads._rules._sparse_lookups import refuse_options
from gradfilter.grads._tape import Tape, Weight


def embedding(
    host: Host,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`torch.nn.functional.embedding`; vmap's own rule would mask padding in the first row only."""
    if not host.batched(weight):
        return NotImplemented
    refuse_options("embedding", sparse, max_norm)
    weights = host.weights(weight)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    index = host.level.lower(input)
    if weights is None:
        tables = host.level.lower(weight)
        return host.run("embedding", _own_tables, index, tables, padding, scale_grad_by_freq)
    return host.run("embedding", _apply, host, index, *weights, padding, scale_grad_by_freq)


def embedding_of(
    host: Host,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`torch.embedding` and `torch.ops.aten.embedding`, where −1 stands for no padding."""
    padding = padding_idx if padding_idx >= 0 else None
    return embedding(
        host, indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )


def _own_tables(index: Tensor, tables: Tensor, padding: int, by_frequency: bool) -> Tensor:
    """Every row looks up in its own table (M, units, width), all of them in one lookup."""
    count, units = tables.shape[:2]
    first = torch.arange(count, device=index.device) * units
    places = index + first.view(-1, *[1] * (index.ndim - 1))
    # Counted per table: no two rows share a place.
    found = F.embedding(places, tables.flatten(0, 1), scale_grad_by_freq=by_frequency)
    if padding < 0:
        return found
    return torch.where((index == padding)[..., None], found.detach(), found)


def _apply(host: Host, index: Tensor, weight: Weight, padding: int, by_frequency: bool) -> Tensor:
    width = weight.value.shape[1]
    kept = index.nbytes + index.numel() * width * weight.value.element_size()
    n = index.numel() // len(index)
    # A row touches n of the table's units: their products are compared with the whole table's.
    ghost = ghost_flops(len(index), n, width, len(weight.value)) if n else None
    host.used("embedding", weight, index.numel() * width, kept, ghost)
    y: Tensor = _Embedding.apply(index, rows_of(weight), weight, padding, by_frequency, host.tape)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        rows: Tensor,
        weight: Weight,
        padding: int,
        by_frequency: bool,
        tape: Tape,
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.weight, ctx.padding, ctx.by_frequency, ctx.tape = weight, padding, by_frequency, tape
        return F.embedding(index, weight.value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        shape = ctx.weight.value.shape
        index, grad = index.flatten(1), grad.reshape(len(grad), -1, shape[1])
        if ctx.padding >= 0:
            grad = torch.where((index == ctx.padding)[..., None], 0.0, grad)
        if ctx.by_frequency:  # within the row, as its own backward pass would count
            ones = torch.ones_like(index, dtype=grad.dtype)
            counts = grad.new_zeros(len(index), shape[0]).scatter_add_(1, index, ones)
            grad = grad / counts.gather(1, index)[..., None]
        factor = EmbeddingFactor(index, grad, shape)
        return None, ctx.tape.record(ctx.weight, factor), None, None, None, None
