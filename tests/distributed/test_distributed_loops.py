"""Training loops on several ranks: the DDP recipe, `Filtered`, and SAM without synchronisation."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import gradfilter as gf
from gradfilter.distributed import across_ranks
from gradfilter.interop import GSAM, SAM, Filtered, LinearScheduler

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
STEPS, B = 6, 4


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batch(step, n):
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)


def mine(tensors):
    rank, size = dist.get_rank(), dist.get_world_size()
    return tuple(t.unflatten(0, (size, -1))[rank] for t in tensors)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)


def single(threshold, m, steps=STEPS):
    """Return the parameters and skipped steps of one process that has the rows of all ranks."""
    model = network()
    filtered = Filtered(model, F.cross_entropy, gf.agree_filter(threshold), optimizer_of(model), m)
    kept = [bool(filtered.step(*batch(k, B * m)).info["keep"]) for k in range(steps)]
    return dict(model.named_parameters()), kept


def close(model, expected):
    torch.testing.assert_close(dict(model.named_parameters()), expected, **TIGHT)


def ddp_recipe():
    """Run the loop of docs/ideas/distributed.md: rows under no_sync, filtered across the ranks."""
    size = dist.get_world_size()
    ddp = DistributedDataParallel(network())
    optimizer = optimizer_of(ddp.module)
    filters = gf.chain(across_ranks(), gf.agree_filter(0.9))
    params = {name: p.detach() for name, p in ddp.module.named_parameters()}
    state, kept = filters.init(params), []
    for k in range(STEPS):
        x, y = mine(batch(k, B * size))
        optimizer.zero_grad()
        with ddp.no_sync():
            F.cross_entropy(ddp(x), y).backward()
        rows = {name: p.grad[None] for name, p in ddp.module.named_parameters()}
        grads, state, out = filters.update(rows, state, params)
        for name, p in ddp.module.named_parameters():
            p.grad = grads[name]
        kept.append(bool(out["keep"]))
        if kept[-1]:
            optimizer.step()
    expected, kept_alone = single(0.9, size)
    close(ddp.module, expected)
    assert kept == kept_alone
    return sum(kept)


def test_the_recipe_for_a_plain_ddp_loop(two):
    kept = two.run(ddp_recipe)
    assert kept[0] == kept[1] and 0 < kept[0] < STEPS


def filtered_across(m, accumulate):
    size = dist.get_world_size()
    model = DistributedDataParallel(network()).module
    optimizer = optimizer_of(model)
    transforms = gf.chain(across_ranks(), gf.agree_filter(0.9))
    filtered = Filtered(model, F.cross_entropy, transforms, optimizer, m)
    calls, step = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))[1]
    kept = []
    for k in range(STEPS):
        x, y = mine(batch(k, B * m * size * (2 if accumulate else 1)))
        if accumulate:
            filtered.accumulate(x[: B * m], y[: B * m])
            x, y = x[B * m :], y[B * m :]
        kept.append(bool(filtered.step(x, y).info["keep"]))
    expected, kept_alone = single(0.9, m * size * (2 if accumulate else 1))
    close(model, expected)
    assert kept == kept_alone and len(calls) == sum(kept)
    return kept


@pytest.mark.parametrize(("m", "accumulate"), [(1, False), (3, False), (1, True)])
def test_filtered_with_the_rows_of_all_ranks(two, m, accumulate):
    kept = two.run(filtered_across, m, accumulate)
    assert kept[0] == kept[1] and any(kept[0])


def scaled(place):
    """A GradScaler; in the second step the rows of rank 1 overflow.

    They are rejected by a filter of all rows, which is where `Filtered` puts its own; one of every
    rank makes all ranks skip the step.
    """
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = [gf.finite_filter()]
    transforms = gf.chain(
        *guard * (place == "before"), across_ranks(), *guard * (place == "after"), gf.mean_rows()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weighted = lambda output, targets: F.cross_entropy(output, targets[0]) * targets[1].mean()
    filtered = Filtered(model, weighted, transforms, optimizer, 2, scaler=scaler)
    reference = network()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for k in range(3):
        x, y = batch(k, 16)
        bad = k == 1
        weights = torch.ones(16)
        if bad:
            weights[8:] = 1e306  # the losses are finite, what is scaled is not
        x_here, y_here, weights = mine((x, y, weights))
        result = filtered.step(x_here, (y_here, weights))
        assert bool(result.info["keep"]) == (not bad or place != "before")
        if result.info["keep"]:
            plain.zero_grad()
            F.cross_entropy(reference(x[:8] if bad else x), y[:8] if bad else y).backward()
            plain.step()
        torch.testing.assert_close(
            dict(model.named_parameters()), dict(reference.named_parameters()), **TIGHT
        )
    return scaler.get_scale()


def test_filtered_with_a_scaler_on_several_ranks(two):
    for place in ("after", "by itself"):
        ours = two.run(scaled, place)
        assert ours[0] == ours[1] == 2.0**9  # all backed off together
    alone = two.run(scaled, "before")  # every rank has a scale of its own
    assert alone == [2.0**10, 2.0**9]


def m_sharpness(kind):
    """SAM under no_sync against m-sharpness by its definition, with one row per rank."""
    rho, alpha, lr, size = 0.3, 0.4, 0.1, dist.get_world_size()
    ddp = DistributedDataParallel(network())
    base = torch.optim.SGD(ddp.parameters(), lr=lr)
    if kind == "sam":
        optimizer = SAM(ddp.parameters(), base, rho, model=ddp, no_sync=ddp.no_sync)
        links = [gf.sam_perturb(rho), across_ranks(), gf.mean_rows()]
    else:
        radius = LinearScheduler(T_max=10, max_value=rho, min_value=rho)
        optimizer = GSAM(ddp.parameters(), base, ddp, alpha, radius, no_sync=ddp.no_sync)
        links = [gf.sam_perturb(rho), gf.mean_rows(), gf.gsam_decompose(alpha)]
    x, y = mine(batch(0, B * size))
    optimizer.set_closure(F.cross_entropy, x, y)
    optimizer.step()
    model = network()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 1)(params, (x, y))
    link = gf.chain(*links)
    with torch.no_grad():
        grads, _, _ = link.update(rows, link.init(params), params)
    if kind == "gsam":  # the mean of what every rank made of its own gradients
        for g in grads.values():
            dist.all_reduce(g)
            g /= size
    close(ddp.module, {name: p - lr * grads[name] for name, p in params.items()})


@pytest.mark.parametrize("kind", ["sam", "gsam"])
def test_in_place_sharpness_without_synchronisation(two, kind):
    two.run(m_sharpness, kind)
