"""Bags of embeddings: a lookup over all rows and a sum, where vmap would go row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._embedding import embedding
from gradfilter.grads._rules._host import Host
from gradfilter.grads._rules._sparse_lookups import refuse_options


def embedding_bag(
    host: Host,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """`torch.nn.functional.embedding_bag` on bags of one length, (B, length)."""
    if not host.batched(weight) or not weight.is_floating_point():
        return NotImplemented
    refuse_options("embedding_bag", sparse, max_norm)
    if input.ndim != 2 or not input.shape[1] or scale_grad_by_freq or offsets is not None:
        return NotImplemented
    if per_sample_weights is not None and mode != "sum":
        return NotImplemented  # torch says what is wrong
    host.tape.overrides["embedding_bag"] += 1
    found = embedding(host, input, weight, padding_idx)
    if per_sample_weights is not None:
        found = found * per_sample_weights[..., None]
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    kept = (input != padding)[..., None]
    if mode == "max":
        largest = torch.where(kept, found, float("-inf")).max(1).values
        return torch.where(kept.any(1), largest, 0.0)
    if padding_idx is not None:
        found = torch.where(kept, found, 0.0)
    total = found.sum(1)
    return total / kept.sum(1).clamp(min=1) if mode == "mean" else total


def embedding_bag_of(
    host: Host,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    """`torch.embedding_bag`, whose bags may differ in length: refused where there are no rows."""
    if host.batched(weight):
        refuse_options("embedding_bag", sparse, None)
    return NotImplemented
