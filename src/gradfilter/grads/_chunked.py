"""Rows at parameters of their own, some at a time: M sets of parameters take their room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._ambient import random_state, set_random_state
from gradfilter.grads._batch import Batch
from gradfilter.grads._fused import Forward
from gradfilter.grads._loop import Rows
from gradfilter.grads._pass import Pass


def chunked_rows(
    run: Callable[[Batch, Params], Forward], batch: Batch, params: Params, size: int
) -> Rows | None:
    """Rows (M, *shape), ``size`` of them at a time, or None where the loss draws random numbers.

    Those are drawn for all rows together, so that a chunk alone would draw others.
    """
    device = _tree.device_of(params)
    before = random_state(device)
    found: list[Rows] = []
    buffers: Tree = batch.buffers
    for low in range(0, len(batch), size):
        rows = slice(low, low + size)
        tensors = [t[rows] for t in batch.tensors]
        part = run(
            replace(batch, tensors=tensors, buffers=buffers),
            {name: p[rows] for name, p in params.items()},
        )
        after = random_state(device)
        if any(not torch.equal(after[kind], before[kind]) for kind in before):
            set_random_state(before, device)
            return None
        buffers = part.buffers
        found.append((_rows_of(part, params), part.losses.detach(), buffers, part.aux))
    grads, losses, _, aux = zip(*found, strict=True)
    joined = None if aux[0] is None else _tree.tree_map(lambda *t: torch.cat(t), *aux)
    return _tree.tree_map(lambda *t: torch.cat(t), *grads), torch.cat(losses), buffers, joined


def _rows_of(part: Forward, params: Params) -> Tree:
    return Pass(lambda: part, part, budget=0).rows(list(params))
