"""Embeddings with padding in modules that run row by row: masked by hand, not by torch.

An embedding that torch itself masks is refused in the graph of a pass over all rows, where vmap's
own rule would have masked the padding of the first row alone. Outside of vmap it is right, and
nothing in the graph tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfilter.grads._rules._spellings import spellings


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
