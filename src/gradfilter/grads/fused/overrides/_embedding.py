"""Overrides of embeddings: one lookup over all rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub
from typing_extensions import override

from gradfilter.grads.fused._along import add_lookups
from gradfilter.grads.fused._factors import EmbeddingFactor
from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._tape import Weight
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)
from gradfilter.grads.fused.overrides._spellings import spellings

# --- Embeddings with sparse gradients: only the loop supports them ---


LOOKUPS: dict[Callable[..., Any], tuple[int, int]] = {
    F.embedding: (1, 6),
    F.embedding_bag: (1, 7),
    **dict.fromkeys(spellings("embedding"), (0, 4)),
    **dict.fromkeys(spellings("embedding_bag"), (0, 5)),
}
"""The positions of the arguments ``weight`` and ``sparse`` of each function."""


def refuse_options(name: str, sparse: bool, max_norm: float | None) -> None:
    """Refuse options that do not give dense rows."""
    if sparse or max_norm is not None:
        option = "sparse=True" if sparse else "max_norm"
        raise RuntimeError(
            f"{name} with {option} cannot run over all rows at once: "
            + ("its gradients are not dense rows." if sparse else "it writes into its weight.")
        )


def refuse_sparse(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse sparse gradients of a trained weight under ``vmap(grad(loss))``."""
    weight_at, sparse_at = LOOKUPS[function]
    weight = args[weight_at] if len(args) > weight_at else kwargs.get("weight")
    sparse = args[sparse_at] if len(args) > sparse_at else kwargs.get("sparse", False)
    if isinstance(weight, Tensor) and _functorch.is_gradtrackingtensor(weight):
        refuse_options(function.__name__.split(".")[0], sparse, None)


# --- Embeddings ---


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
    """Replace `torch.nn.functional.embedding`; vmap would mask padding in the first row only."""
    if not host.batched(weight):
        return NotImplemented
    refuse_options("embedding", sparse, max_norm)
    shared = host.weight(weight, moves=True)
    if shared is not None and shared.move is not None and shared.move.lookups() is None:
        shared, weight = None, host.own(weight)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    index = host.level.lower(input)
    if shared is None:
        tables = host.level.lower(weight)
        return host.run("embedding", _own_tables, index, tables, padding, scale_grad_by_freq)
    return host.run("embedding", _apply, host, index, shared, padding, scale_grad_by_freq)


def embedding_of(
    host: Host,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Replace `torch.embedding` and `torch.ops.aten.embedding`, where −1 means no padding."""
    padding = padding_idx if padding_idx >= 0 else None
    return embedding(
        host, indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )


def _own_tables(index: Tensor, tables: Tensor, padding: int, by_frequency: bool) -> Tensor:
    """Look up every row in its own table (M, units, width), all rows in one lookup."""
    count, units = tables.shape[:2]
    first = torch.arange(count, device=index.device) * units
    places = index + first.view(-1, *[1] * (index.ndim - 1))
    # Frequencies are counted per table, because no two rows share a unit.
    found = F.embedding(places, tables.flatten(0, 1), scale_grad_by_freq=by_frequency)
    if padding < 0:
        return found
    return torch.where((index == padding)[..., None], found.detach(), found)


def note_lookup(host: Host, override: str, index: Tensor, weight: Weight) -> None:
    """Note the lookup of (M, ...) units of a table for the choice of modes."""
    width = weight.shape[1]
    kept = index.numel() * (index.element_size() + width * weight.dtype.itemsize)
    n, units = math.prod(index.shape[1:]), weight.shape[0]
    # The Gram takes the products of all positions, or those of the tables if these are fewer.
    ghost = 2 * index.numel() ** 2 * width if n * n <= units else None
    host.used(override, weight, index.numel() * width, kept, ghost)


def _apply(host: Host, index: Tensor, weight: Weight, padding: int, scaled: bool) -> Tensor:
    note_lookup(host, "embedding", index, weight)
    y = _Embedding(padding, scaled).apply(host.tape, index, weight, None)
    if weight.move is None:
        return y
    lookups, flat = weight.move.lookups(), index.flatten(1)
    assert lookups is not None  # else every row has its own table
    moved = add_lookups(y.view(*flat.shape, y.shape[-1]), flat, lookups, weight.move.steps)
    return moved.view(y.shape)


@dataclass(eq=False)
class _Embedding(RowOperation[Tensor]):
    """The input is the index; a negative ``padding`` stands for none."""

    padding: int
    scaled: bool

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        return F.embedding(x, weight), (x,)

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        shape, index = weight.shape, saved[0].flatten(1)
        grad = grad.reshape(*index.shape, shape[1])
        if self.padding >= 0:
            grad = torch.where((index == self.padding)[..., None], 0.0, grad)
        if self.scaled:
            grad = by_frequency(index, grad, shape[0])
        return Gradients(weight=EmbeddingFactor(index, grad, shape))


def by_frequency(index: Tensor, grad: Tensor, units: int) -> Tensor:
    """Divide the gradient (M, n, width) of every position by how often its row has the unit.

    It is counted within the row, as in its own backward pass.
    """
    ones = torch.ones_like(index, dtype=grad.dtype)
    counts = grad.new_zeros(index.shape[0], units).scatter_add_(1, index, ones)
    return grad / counts.gather(1, index)[..., None]
