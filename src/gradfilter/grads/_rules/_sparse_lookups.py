"""Embeddings whose gradients are sparse: no plan but the loop can take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from gradfilter.grads._rules._spellings import spellings

LOOKUPS: dict[Callable[..., Any], tuple[int, int]] = {
    F.embedding: (1, 6),
    F.embedding_bag: (1, 7),
    **dict.fromkeys(spellings("embedding"), (0, 4)),
    **dict.fromkeys(spellings("embedding_bag"), (0, 5)),
}
"""Where each function takes its weight, and where it is told that gradients shall be sparse."""


def refuse_options(name: str, sparse: bool, max_norm: float | None) -> None:
    """Refuse what leaves no dense rows behind."""
    if sparse or max_norm is not None:
        option = "sparse=True" if sparse else "max_norm"
        raise RuntimeError(
            f"{name} with {option} cannot run over all rows at once: "
            + ("its gradients are no dense rows." if sparse else "it writes into its weight.")
        )


def refuse_sparse(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse sparse gradients of a weight that is trained, under ``vmap(grad(loss))``."""
    weight_at, sparse_at = LOOKUPS[function]
    weight = args[weight_at] if len(args) > weight_at else kwargs.get("weight")
    sparse = args[sparse_at] if len(args) > sparse_at else kwargs.get("sparse", False)
    if isinstance(weight, Tensor) and _functorch.is_gradtrackingtensor(weight):
        refuse_options(function.__name__.split(".")[0], sparse, None)
