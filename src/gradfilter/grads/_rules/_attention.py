"""Attention: rows become part of the batch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._rules._host import Host


def scaled_dot_product_attention(
    host: Host,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, which vmap would run row by row."""
    rank = query.ndim
    if not host.batched(query, key, value) or not rank == key.ndim == value.ndim >= 3:
        return NotImplemented
    if len({query.shape[0], key.shape[0], value.shape[0]}) > 1:
        return NotImplemented
    if attn_mask is not None and attn_mask.ndim > rank:
        return NotImplemented
    options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    operands = [host.level.lower(t) for t in (query, key, value)]
    mask = None if attn_mask is None else _mask(host, attn_mask, rank, query.shape[0])
    return host.run("attention", _apply, operands, mask, options)


def _mask(host: Host, mask: Tensor, rank: int, samples: int) -> Tensor:
    """A mask that broadcasts against (M B, ...)."""
    if not host.level.batched(mask) and (mask.ndim < rank or mask.shape[0] == 1):
        return mask
    rows = host.level.lower(mask)
    rows = rows.reshape(len(rows), *[1] * (rank - mask.ndim), *mask.shape)
    return rows.expand(len(rows), samples, *rows.shape[2:]).flatten(0, 1)


def _apply(operands: list[Tensor], mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    rows = len(operands[0])
    query, key, value = (t.flatten(0, 1) for t in operands)
    y = F.scaled_dot_product_attention(query, key, value, mask, **options)
    return y.view(rows, -1, *y.shape[1:])
