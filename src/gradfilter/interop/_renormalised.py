"""Embeddings with max_norm in place: torch renormalises the rows that a forward pass looks up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch


@contextmanager
def renormalised(module: nn.Module) -> Iterator[None]:
    """Renormalise, at the end, what the passes in between looked up of each embedding.

    A pure loss renormalises a copy of the weight it is given; in a plain loop the forward pass
    writes into the weight itself, and the optimizer starts from what it left.
    """
    embeddings = [m for m in module.modules() if getattr(m, "max_norm", None) is not None]
    looked_up: list[tuple[Any, Tensor]] = []

    def note(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[0] if args else kwargs["input"]
        if not _functorch.is_functorch_wrapped_tensor(index):  # of a pass that is refused
            looked_up.append((embedding, index.detach()))

    with ExitStack() as stack:
        for embedding in embeddings:
            hook = embedding.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
        yield
    with torch.no_grad():
        for embedding, index in looked_up:
            places = index.contiguous().flatten()
            torch.embedding_renorm_(
                embedding.weight, places, embedding.max_norm, embedding.norm_type
            )
