"""Embeddings with padding that no rule could see: scripted, traced, under a vmap of the loss's own.

vmap's own rule joins the tables of all rows into one and masks ``padding_idx`` in the first table
alone. The rule of plan "fused" does it right for every function that Python calls; what is called
from within a compiled graph, or inside another transform, shows only in the graph of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._rules._spellings import spellings

NONE = 2**63
"""Up to here an index: torch keeps −1, no padding, as a number without a sign."""


def refuse_masked_lookups(losses: Tensor) -> None:
    """Refuse losses whose graph holds an embedding with padding that vmap itself has run."""
    ahead = [losses.grad_fn]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        if node.name() == "EmbeddingBackward0" and 0 <= node._saved_padding_idx < NONE:  # type: ignore[attr-defined]
            raise RuntimeError(
                "embedding with padding_idx cannot run over all rows at once in a scripted or "
                "traced function, or inside a transform of the loss's own: vmap would mask the "
                "padding of the first row alone."
            )
        for before, _ in node.next_functions:
            if before not in seen:
                seen.add(before)
                ahead.append(before)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`F.embedding`, with its padding masked by hand."""
    found = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight))[..., None], found.detach(), found)


def _embedding_of(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.embedding`, with its padding masked by hand."""
    found = torch.embedding(weight, indices, -1, *args, **kwargs)
    return torch.where((indices == padding_idx)[..., None], found.detach(), found)


MASKED_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    **dict.fromkeys(spellings("embedding"), _embedding_of),
}
"""For what runs row by row, outside of vmap: right without any rule, and not to be refused."""
