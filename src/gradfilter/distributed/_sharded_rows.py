"""Rows of a module whose parameters are sharded, by ordinary backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from gradfilter import _tree
from gradfilter._shards import is_sharded
from gradfilter.distributed._sharded_stack import ShardedStack


def sharded_rows(
    model: nn.Module, loss: Callable[[Any], Tensor], batch: Any, microbatches: int
) -> ShardedStack:
    r"""M rows of a module under ``fully_shard``, from M ordinary backward passes in place.

    `torch.func.vmap` cannot run over a sharded module, which mixes Tensors and DTensors. FSDP
    averages a gradient over the ranks before it shards it, so that **each row is the mean over the
    ranks** of their microbatches m: rows disagree less than those of single ranks, and a threshold
    tuned on one process is to be tuned again.

    The gradients are taken where the model is; buffers change as in any training step. Gradients
    in ``p.grad`` are put aside and back. The rows cannot be computed at other parameters:
    `sam_perturb` refuses them, ``gradfilter.interop.SAM`` around the optimizer works.

    Args:
        model: A module all of whose trainable parameters are DTensors.
        loss: ``loss(microbatch) -> ()``, the mean over the microbatch; it calls the model.
        batch: This rank's N = M·B samples: any tree of tensors with a leading axis N.
        microbatches: M.

    Returns:
        The rows, with the losses averaged over the ranks.

    Raises:
        ValueError: N is not divisible by M; a trainable parameter is not sharded.

    Example:
        >>> import torch, torch.distributed as dist, gradfilter as gf
        >>> from torch.distributed.fsdp import fully_shard
        >>> from gradfilter.distributed import sharded_rows
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        >>> model = fully_shard(torch.nn.Linear(2, 2), mesh=mesh)
        >>> loss = lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> update = gf.chain(gf.agree_filter(2.0), gf.sgd(0.1))
        >>> params = {name: p.detach() for name, p in model.named_parameters()}  # the same memory
        >>> state = update.init(params)
        >>> rows = sharded_rows(model, loss, (torch.randn(8, 2), torch.arange(8) % 2), 4)
        >>> params, state, info = update(params, state, rows, donate=True)  # in the model itself
        >>> info["agree_filter/accepted"]
        tensor([True, True, True, True])
        >>> dist.destroy_process_group()
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = sorted(name for name, p in params.items() if not is_sharded(p))
    if plain or not params:
        raise ValueError(
            f"sharded_rows: expected trainable parameters that are DTensors, found plain "
            f"{plain[:3] or 'none at all'}. Call fully_shard(model) on the whole model; for plain "
            "parameters use microbatch_grads and across_ranks."
        )
    before = {name: p.grad for name, p in params.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    losses = []
    try:
        for microbatch in _microbatches(batch, microbatches):
            for p in params.values():
                p.grad = None
            with torch.enable_grad():
                value = loss(microbatch)
            value.backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach())
            for name, p in params.items():
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    finally:
        for name, p in params.items():
            p.grad = before[name]
    mesh = cast(DTensor, next(iter(params.values()))).device_mesh
    everywhere = [Partial()] * mesh.ndim
    total = DTensor.from_local(torch.stack(losses), mesh, everywhere, run_check=False)
    return ShardedStack(
        {name: torch.stack(grads).detach() for name, grads in rows.items()},
        total.full_tensor() / mesh.size(),
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def _microbatches(batch: Any, count: int) -> list[Any]:
    """The batch cut along its leading axis."""
    sizes = {len(leaf) for leaf in _tree.leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else 0
    if count < 1 or not size or size % count:
        raise ValueError(
            f"sharded_rows: expected tensors of one length N that {count} microbatches divide, "
            f"found N = {size or sorted(sizes)}. Choose N = M·B, and drop_last=True in the "
            "DataLoader."
        )
    step = size // count
    return [
        _tree.tree_map(lambda leaf, at=at: leaf[at : at + step], batch)
        for at in range(0, size, step)
    ]
