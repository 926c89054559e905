"""Plan "vmap": all rows at once by ``torch.func.vmap(torch.func.grad_and_value(loss))``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import grad_and_value, vmap

from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._check_loss import check_differentiable
from gradfilter.grads._loop import PureLoss, Rows
from gradfilter.grads._running_stats import Recorded, RecordRunningStats, replay


def vmap_rows(
    loss: PureLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    *,
    cumulative: set[str],
    chunk_size: int | None,
) -> Rows:
    """Rows as in plan "loop", computed together; ``loss`` may write into its buffers.

    Args:
        loss: The pure loss, except that it writes into the buffers it is given.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: The rows.
        per_row: Row m has its own parameters.
        cumulative: Running means with momentum None.
        chunk_size: Rows computed at a time; None for all of them.
    """
    recorded = Recorded()

    def row(params: Params, tensors: list[Tensor], buffers: Tree) -> tuple[Tensor, Any]:
        nonlocal recorded
        own = {name: b.clone() for name, b in buffers.items()}
        with RecordRunningStats(own) as mode:
            value, after, aux = loss(params, batch.rebuild(tensors), own)
        check_differentiable(value)
        recorded = mode.recorded
        mode.check(after)
        counters = {name: b for name, b in after.items() if name.endswith("num_batches_tracked")}
        return value, (counters, recorded.moments, () if aux is None else (aux,))

    rows, (losses, (counters, moments, aux)) = vmap(
        grad_and_value(row, has_aux=True),
        in_dims=(0 if per_row else None, 0, None),
        randomness="different",
        chunk_size=chunk_size,
    )(params, batch.tensors, batch.buffers)
    after = replay(batch.buffers, counters, recorded, moments, cumulative)
    return rows, losses, after, aux[0] if aux else None
