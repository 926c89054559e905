"""Compute the consensus filter on stacked gradients without this library."""

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def sq_norms(grads: Tree) -> Tensor:
    """Compute the squared norms of the rows. (N,)."""
    # First per unit: a single float32 sum of a million squares has an error of 4e-5.
    units = [g.reshape(*g.shape[:2], -1) for g in grads.values()]  # (N, units, rest)
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(u, dim=2), dim=1) for u in units]
    return torch.stack(norms).square().sum(0)


def consensus(grads: Tree) -> Tree:
    """Average the rows, weighted by their cosines with the sum of the other unit rows."""
    rows = {name: g.flatten(1) for name, g in grads.items()}  # (N, p)
    inverse = sq_norms(grads).rsqrt()
    dots = torch.stack([g @ (inverse @ g) for g in rows.values()]).sum(0)
    weights = consensus_weights(dots * inverse)
    return {name: (weights @ g).reshape(grads[name].shape[1:]) for name, g in rows.items()}


def consensus_weights(sums: Tensor) -> Tensor:
    """Compute weights from the products of every unit row with the sum of all. (N,)."""
    cosines = (sums - 1) / (sums.sum() - 2 * sums + 1).sqrt()
    excess = cosines.clamp(min=0)
    return excess / excess.sum()
