"""Overrides of scaled dot-product attention and of `nn.MultiheadAttention`."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import autocast_dtype
from gradfilter.grads.fused.overrides._linear import linear_or_vmap

# --- Attention: the rows become part of the batch ---


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
    """Replace `torch.nn.functional.scaled_dot_product_attention`, which vmap runs row by row."""
    rank = query.ndim
    if not host.batched(query, key, value) or not rank == key.ndim == value.ndim >= 3:
        return NotImplemented
    if not query.shape[0] == key.shape[0] == value.shape[0]:
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
    """Return a mask that broadcasts against (M B, ...)."""
    if not host.level.batched(mask) and (mask.ndim < rank or mask.shape[0] == 1):
        return mask
    rows = host.level.lower(mask)
    rows = rows.reshape(rows.shape[0], *[1] * (rank - mask.ndim), *mask.shape)
    return rows.expand(rows.shape[0], samples, *rows.shape[2:]).flatten(0, 1)


def _apply(operands: list[Tensor], mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    rows, samples = operands[0].shape[:2]
    query, key, value = (t.flatten(0, 1) for t in operands)
    y = F.scaled_dot_product_attention(query, key, value, mask, **options)
    return y.view(rows, samples, *y.shape[1:])


# --- nn.MultiheadAttention: linear layers and attention, which torch hides in one call ---


def multi_head_attention(
    host: Host,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Replace `torch.nn.functional.multi_head_attention_forward`: (T, B, embed) or (T, embed)."""
    if static_k is not None or static_v is not None:
        if autocast_dtype(query.device):
            raise RuntimeError(
                "multi_head_attention_forward with static_k or static_v cannot run over all rows "
                "at once under autocast."
            )
        return NotImplemented
    if not host.batched(query, key, value) or (is_causal and attn_mask is None):
        return NotImplemented
    host.tape.overrides["multi_head_attention"] += 1
    own = {id(t): host.own(t) for t in (query, key, value)}  # one tensor stays one tensor
    query, key, value = (own[id(t)] for t in (query, key, value))
    bias_k, bias_v = host.own(bias_k), host.own(bias_v)
    key_padding_mask, attn_mask = host.own(key_padding_mask), host.own(attn_mask)

    project = functools.partial(linear_or_vmap, host)
    alone = query.ndim == 2
    if alone:
        three = {id(t): t.unsqueeze(1) for t in (query, key, value)}
        query, key, value = (three[id(t)] for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    weights: tuple[Any, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight and query is key and key is value:
        assert in_proj_weight is not None
        q, k, v = project(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            weights = host.own(in_proj_weight).chunk(3)
        shift = host.own(in_proj_bias)
        biases: tuple[Any, ...] = (None,) * 3 if shift is None else shift.chunk(3)
        q, k, v = map(project, (query, key, value), weights, biases)
    length, samples, width = query.shape
    # Added positions that attention is always allowed to use.
    more: list[tuple[Any, Any]] = [] if bias_k is None else [(bias_k, bias_v)]
    for key_part, value_part in more + [(0.0, 0.0)] * add_zero_attn:
        k = torch.cat([k, torch.zeros_like(k[:1]) + key_part])
        v = torch.cat([v, torch.zeros_like(v[:1]) + value_part])
        masks = (attn_mask, key_padding_mask)
        attn_mask, key_padding_mask = (m if m is None else F.pad(m, (0, 1)) for m in masks)
    # (T, B, heads * size) -> (B, heads, T, size)
    q, k, v = (t.reshape(t.shape[0], samples, num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    mask = _merged(attn_mask, key_padding_mask, samples, num_heads, q.dtype)
    dropout = dropout_p if training else 0.0
    attention = None
    if need_weights:
        scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
        attention = F.softmax(scores if mask is None else scores + mask.to(scores.dtype), -1)
        attention = F.dropout(attention, dropout) if dropout else attention
        mixed = attention @ v
        if average_attn_weights:
            attention = attention.mean(1)
    else:
        mixed = scaled_dot_product_attention(host, q, k, v, mask, dropout)
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, samples, width)
    output = project(mixed, out_proj_weight, out_proj_bias)
    if alone:
        return output.squeeze(1), None if attention is None else attention.squeeze(0)
    return output, attention


def _merged(
    mask: Tensor | None, padding: Tensor | None, samples: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Merge both masks into one that is added to the scores; it broadcasts to (B, heads, T, S)."""
    mask, padding = (_added(m, dtype) for m in (mask, padding))
    if mask is not None and mask.ndim == 3:
        mask = mask.view(samples, heads, *mask.shape[1:])
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a bool mask, true where attention is forbidden, to 0 and −inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
