"""The stack whose columns (the parameters) are sharded over ranks, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradfilter import _tree
from gradfilter._shards import ShardPart, cuts, is_sharded, local, parts, resharded
from gradfilter._types import Tree
from gradfilter.distributed._ranks import Ranks
from gradfilter.grads._stack import DenseStack, check_same_leaves

# --- The stack ---


@dataclass(frozen=True, eq=False, repr=False)
class ShardedStack(DenseStack):
    """Rows whose leaves are DTensors: gradients of a model under FSDP2 or tensor parallelism.

    Every rank holds its shard of all M rows. The Gram is the sum over ranks of the Gram of their
    shards: one all-reduce of M x M numbers. ``combine`` sends nothing and gives DTensors, sharded
    like the parameters. All ranks ask the same questions in the same order and get the same
    numbers, bit for bit, so transforms need no changes.

    Arguments and attributes are those of `DenseStack`. A leaf of ``rows`` has a leading axis M that
    is not sharded, as in the result of `torch.stack` on M gradients; leaves may be sharded in
    different ways, or be plain tensors that are the same on every rank. See `sharded_rows`.

    Raises:
        ValueError: The leaves disagree on M, the leading axis is sharded, or a gradient is an
            unfinished sum (`Partial`).

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> from gradfilter.distributed import ShardedStack
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> grads = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> rows = ShardedStack({"w": distribute_tensor(grads, mesh, [Shard(1)])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> dist.destroy_process_group()
    """

    def __post_init__(self) -> None:
        """Check the leaves, and that the axis M is not sharded."""
        super().__post_init__()
        for name, leaf in self.rows.items():
            if 0 in cuts(leaf).values():
                raise ValueError(
                    "ShardedStack: expected the leading axis M whole on every rank, found "
                    f"{name!r} sharded along it. For rows on different ranks use RankStack."
                )
        self._local()

    @override
    def gram(self) -> Tensor:
        """Compute K = J Jᵀ by one all-reduce. (M, M)."""
        return self._summed(lambda stack: stack.gram())

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Compute J v for a tree v that is sharded like the rows. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        shards = {name: leaf for part in parts(tree) for name, leaf in part.leaves.items()}
        return self._summed(lambda stack: stack.dot({name: shards[name] for name in stack.rows}))

    @override
    def sq_norms(self) -> Tensor:
        """Compute the squared norms of the rows by one all-reduce. (M,)."""
        return self._summed(lambda stack: stack.sq_norms())

    @override
    def combine(self, weights: Tensor) -> Tree:
        """Compute wᵀ J shard by shard; the results are DTensors like the parameters."""
        leaves = {n: g for _, stack in self._local() for n, g in stack.combine(weights).items()}
        return {name: resharded(leaves[name], self.rows[name], 1) for name in self.rows}

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        """Compute Σ_m w_m g_m² shard by shard; the results are DTensors like the parameters."""
        leaves = {n: g for _, stack in self._local() for n, g in stack.sum_squares(weights).items()}
        return {name: resharded(leaves[name], self.rows[name], 1) for name in self.rows}

    @override
    def stacked(self) -> Tree:
        if self.scale is None:
            return super().stacked()
        leaves = {n: g for _, stack in self._local() for n, g in stack.stacked().items()}
        return {name: resharded(leaves[name], self.rows[name]) for name in self.rows}

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """Reduce the columns of every shard, without sending anything."""
        found: Tree = {}
        for _, stack in self._local():
            found |= stack.reduce_columns(function)
        return {name: resharded(found[name], self.rows[name], 1) for name in self.rows}

    def _local(self) -> list[tuple[Callable[[Tensor], Tensor], DenseStack]]:
        """Return this rank's shards as stacks, with functions that sum numbers over the ranks."""
        self._check_unwritten()
        return [
            (part.summed, DenseStack(part.leaves, scale=self.scale)) for part in parts(self.rows)
        ]

    def _summed(self, question: Callable[[DenseStack], Tensor]) -> Tensor:
        sums = [summed(question(stack)) for summed, stack in self._local()]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


# --- Its rows, by ordinary backward passes ---


def sharded_rows(
    model: nn.Module, loss: Callable[[Any], Tensor], batch: Any, microbatches: int
) -> ShardedStack:
    r"""Compute M rows of a module under ``fully_shard`` by M ordinary backward passes in place.

    FSDP averages a gradient over the ranks before it shards it, so **each row is the mean over the
    ranks** of their microbatches m. Rows then disagree less than those of single ranks, and a
    threshold tuned on one process must be tuned again. `microbatch_grads` with `across_ranks` gives
    the rows of each rank's own samples, by one pass; this function is for modules that it refuses.

    The gradients are taken at the model's parameters; buffers change as in any training step.
    Gradients in ``p.grad`` are restored afterwards. The rows cannot be computed at other
    parameters, so `sam_perturb` refuses them. For an optimizer of torch, use a chain without an
    update rule: ``grads, state, out = filters.update(rows, state, params)``; write each gradient
    into its ``p.grad``, and call ``optimizer.step()`` if ``out["keep"]``.

    Args:
        model: A module whose trainable parameters are all DTensors.
        loss: ``loss(microbatch) -> ()``, the mean over the microbatch; it calls the model.
        batch: This rank's N = M·B samples: any tree of tensors with a leading axis N.
        microbatches: The number M of rows.

    Returns:
        The rows, with the losses averaged over the ranks.

    Raises:
        ValueError: N is not divisible by M; M differs between ranks (raised on all ranks); a
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
    total = ShardPart({}, first).summed(torch.stack(losses), over=range(mesh.ndim))
    return ShardedStack(
        {name: resharded(torch.stack(rows[name]), p, -1) for name, p in params.items()},
        total / mesh.size(),
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def _shard_of(param: Any) -> Tensor:
    """Return this rank's shard of a parameter's gradient, with the parameter's placement."""
    if param.grad is None:
        return torch.zeros_like(local(param))
    grad: Any = param.grad.detach()
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def _reshard(model: nn.Module) -> None:
    """Free the unsharded parameters that a pass without backward, such as an evaluation, left."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_alike(count: int, mesh: Any) -> None:
    """Refuse numbers of microbatches that differ, before ranks wait for each other."""
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
    """Cut the batch along its leading axis."""
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
