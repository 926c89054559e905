"""Models and meshes of FSDP2: two dimensions, stale state, bfloat16, tied weights."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gradfilter as gf
from _world import World
from gradfilter.distributed import ShardedStack, sharded_rows

M = 3
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def data(seed, n=4 * M):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(5, (n,), generator=g)


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def whole(tree):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tree.items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, **TIGHT)


def mean_rows_of(model, batches, params):
    """Row m is the mean over ranks of the gradients of their microbatches m."""
    rows_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan="loop")
    stacks = [rows_of(params, batch).stacked() for batch in batches]
    return gf.DenseStack({n: torch.stack([s[n] for s in stacks]).mean(0) for n in params})


def same_answers(found, expected):
    weights = torch.tensor([0.5, 0.0, 2.0])
    close(found.gram(), expected.gram())
    close(found.sq_norms(), expected.sq_norms())
    combined = found.combine(weights)
    close(whole(combined), expected.combine(weights))
    close(found.dot(combined), expected.dot(whole(combined)))
    close(whole(found.stacked()), expected.stacked())


def on_all_ranks(model, params):
    batches = [data(seed) for seed in range(dist.get_world_size())]
    return batches[dist.get_rank()], mean_rows_of(model, batches, params)


def two_dims():
    """FSDP over tensor parallelism: pieces of pieces, interleaved, and units cut along either."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(
        network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh["data"])
    batches = [data(0), data(1)]
    rows = sharded_rows(model, loss_of(model), batches[mesh["data"].get_local_rank()], M)
    single, _ = gf.extract(network())
    expected = mean_rows_of(network(), batches, single)
    same_answers(rows, expected)
    params = {n: p.detach() for n, p in model.named_parameters()}
    assert all(g.placements == params[n].placements for n, g in rows.combine(torch.ones(M)).items())
    update = gf.chain(
        gf.agree_filter(2.0), gf.agc_clip(0.2), gf.clip_by_global_norm(0.1), gf.adamw(0.1)
    )
    states = [update.init(params), update.init(single)]
    for _ in range(2):
        params, states[0], found = update(params, states[0], rows)
        single, states[1], info = update(single, states[1], expected)
        assert 0 < info["agc_clip/clipped_fraction"] < 1
        for key, value in info.items():
            close(found[key].to(value.dtype), value)
    close(whole(params), single)


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism():
    world = World(4)
    try:
        world.run(two_dims)
    finally:
        world.close()


def leftovers():
    """An evaluation, a loss that raises and one nobody differentiates leave whole parameters."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    batch, expected = on_all_ranks(network(), gf.extract(network())[0])
    calls = []

    def raising(part):
        calls.append(part)
        value = loss_of(model)(part)
        if len(calls) == 2:
            raise ArithmeticError("my own")
        return value

    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    with pytest.raises(ArithmeticError, match="my own"):
        sharded_rows(model, raising, batch, M)
    assert all((p.grad.to_local() == 3).all() for p in model.parameters())
    with torch.no_grad():
        model(batch[0])
        rows = sharded_rows(model, loss_of(model), batch, M)
    assert all((p.grad.to_local() == 3).all() for p in model.parameters())
    same_answers(rows, expected)
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match=r"found none\. .*set_requires_gradient_sync\(False\)"):
        sharded_rows(model, loss_of(model), batch, M)


def test_what_earlier_passes_left_behind(two):
    two.run(leftovers)


def another_number():
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    sharded_rows(model, loss_of(model), data(0), 2 + dist.get_rank())


def test_another_number_of_microbatches_is_an_error_on_every_rank(two):
    for said in two.errors(another_number):
        assert "found 2 on rank 0 and 3 on rank 1" in said


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.frozen = torch.nn.Linear(6, 5), torch.nn.Linear(5, 6)
        self.out = torch.nn.Linear(6, 5)
        self.out.weight = self.into.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.out(self.frozen(self.into(x)).tanh())


def tied():
    torch.manual_seed(0)
    reference = Tied()
    model = fully_shard(copy.deepcopy(reference), mesh=init_device_mesh("cpu", (2,)))
    batch, expected = on_all_ranks(reference, gf.extract(reference)[0])
    rows = sharded_rows(model, loss_of(model), batch, M)
    assert list(rows.rows) == ["into.weight", "into.bias", "out.bias"]
    same_answers(rows, expected)


def test_tied_and_frozen_parameters(two):
    two.run(tied)


def half_precision(reshard):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh, model = init_device_mesh("cpu", (2,)), network().float()
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    batch = data(dist.get_rank())
    rows = sharded_rows(model, loss_of(model), (batch[0].float(), batch[1]), M)
    _, expected = on_all_ranks(network(), gf.extract(network())[0])
    assert {leaf.dtype for leaf in rows.rows.values()} == {torch.float32}
    torch.testing.assert_close(rows.gram(), expected.gram(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("reshard", [True, False])
def test_mixed_precision(two, reshard):
    two.run(half_precision, reshard)


def mixed():
    """Leaves sharded along either dim, replicated and plain, each counted once."""
    mesh = init_device_mesh("cpu", (2,))
    places = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
    shapes = {"rows": (5, 3), "columns": (4, 6), "copies": (3, 3), "plain": (4,)}
    g = torch.Generator().manual_seed(0)
    grads = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    params = {name: leaf + 2 for name, leaf in grads.items()}

    def spread(tree):
        return {
            n: distribute_tensor(t, mesh, [places[n]]) if n in places else t
            for n, t in tree.items()
        }

    for link in (gf.clip_by_global_norm(0.1), gf.agc_clip(0.05), gf.finite_filter()):
        found = link.update(spread(grads), {}, spread(params))
        expected = link.update(grads, {}, params)
        close(whole(found[0]), expected[0])
        for key, value in expected[2].items():
            close(found[2][key].to(value.dtype), value)
    link = gf.sam_perturb(0.3, adaptive="asam")
    found = link.update(spread(grads), {}, spread(params), grad_fn=lambda near: near)[0]
    close(whole(found), link.update(grads, {}, params, grad_fn=lambda near: near)[0])
    rows = [{n: k * t for n, t in grads.items()} for k in (1.0, 2.0, -1.0)]
    stack = ShardedStack({n: torch.stack([spread(row)[n] for row in rows]) for n in grads})
    same_answers(stack, gf.DenseStack({n: torch.stack([row[n] for row in rows]) for n in grads}))


def test_leaves_that_lie_in_different_ways(two):
    two.run(mixed)
