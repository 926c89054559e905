"""Run operations without a rule for vmap row by row.

vmap would also run them row by row, with a warning. But it selects every row from the tensors of
all rows, and the backward pass of each selection fills a tensor of all rows: M² rows. Here the
rows are split once, so the backward pass stacks their gradients once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gradfilter import _tree
from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused.overrides._spellings import spellings


def row_by_row(function: Callable[..., Any]) -> Override:
    """Return an override that calls the function itself for every row."""

    def override(host: Host, *args: Any, **kwargs: Any) -> Any:
        leaves, rebuild = _tree.flatten((args, kwargs))
        if not host.batched(*leaves):
            return NotImplemented
        host.tape.looped.add(function.__name__.split(".")[0])
        lower, batched = host.level.lower, host.level.batched
        # Only what differs is split: a tensor that all rows share has no row.
        split = {at: lower(leaf) for at, leaf in enumerate(leaves) if batched(leaf)}
        with host.level.on_all_rows():
            parts = {at: rows.unbind() for at, rows in split.items()}
            found = []
            for row in range(host.level.rows):
                own = [parts[at][row] if at in parts else x for at, x in enumerate(leaves)]
                given, named = rebuild(own)
                found.append(function(*given, **named))
            stacked = _tree.tree_map(lambda *rows: torch.stack(rows), *found)
        return _tree.tree_map(host.level.wrap, stacked)

    return override


NAMES = (
    *("affine_grid_generator", "bilinear", "chain_matmul", "conv_tbc", "ctc_loss", "diagflat"),
    *("embedding_bag", "index_reduce", "kl_div", "lu_solve", "margin_ranking_loss"),
    *("masked_scatter", "max_unpool2d", "max_unpool3d", "multi_margin_loss"),
    *("multilabel_margin_loss", "nanquantile", "norm_except_dim", "ormqr", "pdist", "put"),
    *("quantile", "renorm", "segment_reduce", "soft_margin_loss", "special_log_ndtr", "stft"),
    *("take", "triplet_margin_loss"),
)
"""Operations of torch that vmap has no rule for, without those that have an override.

Each of them was tried on the examples of torch's own tests; operations that write into a tensor,
draw random numbers, or have no gradient are not listed.
"""

COMPOSED: tuple[Callable[..., Any], ...] = (
    *(F.affine_grid, F.bilinear, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d),
    *(torch.stft, torch.chain_matmul, torch.fft.ihfft2, torch.fft.ihfftn, torch.linalg.lu),
    *(torch.linalg.tensorsolve, torch.special.log_ndtr),
)
"""Functions that call one of them where no override sees it."""

ROW_BY_ROW: dict[Callable[..., Any], Override] = {
    function: row_by_row(function)
    for function in (*(f for name in NAMES for f in spellings(name)), *COMPOSED)
}
"""The override of every spelling of these operations."""
