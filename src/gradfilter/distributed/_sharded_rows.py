"""Rows of a module whose parameters are sharded, by ordinary backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._shards import Part, is_sharded, local, resharded
from gradfilter.distributed._ranks import Ranks
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
    `sam_perturb` refuses them. An optimizer of torch takes what a chain without an update rule
    makes of them: ``grads, state, out = filters.update(rows, state, params)``, each into its
    ``p.grad``, and ``optimizer.step()`` if ``out["keep"]``.

    Args:
        model: A module all of whose trainable parameters are DTensors.
        loss: ``loss(microbatch) -> ()``, the mean over the microbatch; it calls the model.
        batch: This rank's N = M·B samples: any tree of tensors with a leading axis N.
        microbatches: M.

    Returns:
        The rows, with the losses averaged over the ranks.

    Raises:
        ValueError: N is not divisible by M; M differs between ranks, then on all of them; a
            trainable parameter is not sharded; no gradient arrived.

    Examples:
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
    _reshard(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = sorted(name for name, p in params.items() if not is_sharded(p))
    if plain or not params:
        raise ValueError(
            f"sharded_rows: expected trainable parameters that are DTensors, found plain "
            f"{plain[:3] or 'none at all'}. Call fully_shard(model) on the whole model; for plain "
            "parameters use microbatch_grads and across_ranks."
        )
    cut = _microbatches(batch, microbatches)
    first: Any = next(iter(params.values()))
    mesh = first.device_mesh
    _check_alike(microbatches, mesh)
    before = {name: p.grad for name, p in params.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    losses = []
    try:
        for microbatch in cut:
            for p in params.values():
                p.grad = None
            with torch.enable_grad():
                value = loss(microbatch)
            torch.autograd.backward(value)
            losses.append(value.detach())
            if all(p.grad is None for p in params.values()):
                raise ValueError(
                    "sharded_rows: expected gradients after loss(microbatch).backward(), found "
                    "none. Compute the loss by calling the model, and undo "
                    "set_requires_gradient_sync(False)."
                )
            for name, p in params.items():
                rows[name].append(_shard_of(p))
    finally:
        _reshard(model)  # after a loss that raised
        for name, p in params.items():
            p.grad = before[name]
    total = Part({}, first).summed(torch.stack(losses), over=range(mesh.ndim))
    return ShardedStack(
        {name: resharded(torch.stack(rows[name]), p, -1) for name, p in params.items()},
        total / mesh.size(),
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def _shard_of(param: Any) -> Tensor:
    """This rank's shard of the gradient in a parameter, cut up like the parameter."""
    if param.grad is None:
        return torch.zeros_like(local(param))
    grad: Any = param.grad.detach()
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def _reshard(model: nn.Module) -> None:
    """Let go of what a pass without backward, such as an evaluation, has left unsharded."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_alike(count: int, mesh: Any) -> None:
    """Refuse numbers of microbatches that differ, before ranks wait for each other's passes."""
    counts = torch.tensor([count])
    for dim in range(mesh.ndim):
        counts = Ranks.of(mesh.get_group(dim)).gather_on_host(counts).flatten()
    ranks = mesh.mesh.permute(*reversed(range(mesh.ndim))).flatten().tolist()
    found = sorted(zip(ranks, counts.tolist(), strict=True))
    rank, other = next((pair for pair in found if pair[1] != found[0][1]), found[0])
    if other != found[0][1]:
        raise ValueError(
            f"sharded_rows: expected as many microbatches on every rank, found {found[0][1]} on "
            f"rank {found[0][0]} and {other} on rank {rank}. Give all ranks one number."
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
