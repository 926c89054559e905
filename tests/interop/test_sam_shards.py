"""`SAM` and `GSAM` around an optimizer of shards: an ordinary FSDP2 loop trains as one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradfilter.interop import GSAM, SAM, LinearScheduler

STEPS, N, RHO = 4, 6, 0.3
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def network():
    torch.manual_seed(1)
    norm, last = nn.LayerNorm(7), nn.Linear(7, 3)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0.0), norm, last)


def sharded(layout):
    size, model = dist.get_world_size(), network()
    mesh = init_device_mesh("cpu", (size,))
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(step):
    """The samples of all ranks in one step, in two parts, and those of this rank."""
    g = torch.Generator().manual_seed(step)
    n = N * dist.get_world_size()
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
    of_rank = slice(N * dist.get_rank(), N * (dist.get_rank() + 1))
    return (x, y), (x[of_rank], y[of_rank])


def made(model, kind):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "gsam":
        rho = LinearScheduler(T_max=10, max_value=RHO, min_value=RHO)
        return GSAM(model.parameters(), base, model, 0.4, rho)
    return SAM(model.parameters(), base, RHO, adaptive=kind == "asam", model=model)


def whole(tree):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tree.items()}


def values(model):
    return whole({name: p.detach() for name, p in model.named_parameters()})


def closure_of(model, batch, parts):
    """A closure of as many backward passes as parts."""

    def closure():
        total = 0.0
        for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            loss = F.cross_entropy(model(x), y) / parts
            loss.backward()
            total += loss.detach()
        return total

    return closure


def trained(kind, layout="fsdp", parts=1, resume=False, keeps=False):
    model, plain = sharded(layout), network()
    model.set_reshard_after_backward(not keeps)
    ours, theirs = made(model, kind), made(plain, kind)
    for step in range(STEPS):
        of_all, own = batches(step)
        with torch.no_grad():
            model(own[0])  # leaves the outermost parameters whole, as an evaluation does
        if step == 2:
            ours.zero_grad(set_to_none=False)
        if step == 3 and resume:
            state, shards = ours.state_dict(), ours.param_groups[0]["params"]
            model = sharded(layout)
            for p, q in zip(model.parameters(), shards, strict=True):
                p.detach().copy_(q)
            ours = made(model, kind)
            ours.load_state_dict(state)
        _, loss = ours.step(closure_of(model, own, parts))
        _, expected = theirs.step(closure_of(plain, of_all, 1))
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), expected, **TIGHT)
        torch.testing.assert_close(values(model), values(plain), **TIGHT)
        grads = whole({n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(grads, {n: p.grad for n, p in plain.named_parameters()}, **TIGHT)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("kind", ["sam", "asam", "gsam"])
def test_shards_train_as_one_process_with_all_samples(two, kind):
    two.run(trained, kind)


def test_a_closure_may_run_several_backward_passes(two):
    two.run(trained, "sam", "fsdp", 2)


@pytest.mark.parametrize("kind", ["sam", "gsam"])
def test_a_checkpoint_goes_on(two, kind):
    two.run(trained, kind, "fsdp", 1, True)


@pytest.mark.slow
def test_shards_on_three_ranks(three):
    three.run(trained, "sam")


@pytest.mark.slow
def test_replicas_of_shards(four):
    four.run(trained, "asam", "hsdp")


def test_parameters_that_a_backward_pass_leaves_whole_are_gathered_again(two):
    """The second pass would otherwise run at the old parameters."""
    two.run(trained, "sam", "fsdp", 1, False, True)


def with_scaler():
    """Scaled losses; an overflow on one rank skips the step on both."""
    torch.set_default_dtype(torch.float32)
    try:
        model, plain = sharded("fsdp"), network()
        scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100) for _ in "ab"]
        both = []
        for net, scaler in zip((model, plain), scalers, strict=True):
            base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            both.append(SAM(net.parameters(), base, RHO, model=net, scaler=scaler))
        kept = []
        for step in range(STEPS):
            of_all, own = batches(step)
            if step == 1:
                of_all[0][0] = torch.inf  # a sample of rank 0
            before = values(model)
            for optimizer, scaler, batch in zip(both, scalers, (of_all, own)[::-1], strict=True):
                optimizer.set_closure(F.cross_entropy, *batch)
                optimizer.step()
                scaler.update()
            torch.testing.assert_close(values(model), values(plain), rtol=1e-5, atol=1e-6)
            kept.append(any(not torch.equal(v, before[n]) for n, v in values(model).items()))
            assert scalers[0].get_scale() == scalers[1].get_scale()
        return kept, scalers[0].get_scale()
    finally:
        torch.set_default_dtype(torch.float64)


def test_an_overflow_on_one_rank_skips_the_step_on_all(two):
    assert two.run(with_scaler) == [([True, False, True, True], 4.0)] * 2


def refused():
    model = sharded("fsdp")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SAM: expected no_sync=None with .* sharded .* the mean"):
        SAM(model.parameters(), base, no_sync=lambda: None)


def test_gradients_of_single_ranks_are_refused(two):
    two.run(refused)
