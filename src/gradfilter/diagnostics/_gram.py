"""The largest eigenvalue of J Jᵀ where J is held."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.diagnostics._lanczos import Top

BLOCK = 2**24
"""Numbers of J that are in float64 at one time."""


def top_of_gram(rows: Tensor) -> Top:
    """Largest eigenvalue of J Jᵀ for J (N, C', D), taken in float64. NaN where J is not finite."""
    gram = _gram(rows)
    finite = gram.isfinite().flatten(1).all(1)
    gram = torch.where(finite[:, None, None], gram, 0.0)  # one NaN would fail all
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values, u = eigenvalues[:, -1], vectors[:, :, -1:]
    off = torch.linalg.vector_norm((gram @ u)[..., 0] - values[:, None] * u[..., 0], dim=1)
    residuals = torch.where(values > 0, off / torch.where(values > 0, values, 1.0), off)
    return Top(torch.where(finite, values, torch.nan), torch.where(finite, residuals, torch.nan))


def _gram(rows: Tensor) -> Tensor:
    """J Jᵀ of every sample, (N, C', C')."""
    each = max(1, BLOCK // max(1, rows[0].numel()))
    blocks = (block.to(_tree.wide(rows)) for block in torch.split(rows, each))
    with _tree.no_autocast(rows):
        return torch.cat([block @ block.mT for block in blocks])
