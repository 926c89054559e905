"""`Filtered.accumulate` with chains that act row by row: one gradient, and the plain result."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _allocations import Peak
from gradfilter.interop import Filtered

CHAIN = lambda: gf.chain(gf.finite_filter(), gf.clip_per_row(0.5), gf.mean_rows())
SHARP = lambda: gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.sam_perturb(0.05))


def vectors(n, spoilt=()):
    x, y = torch.randn(n, 6) * torch.arange(1, n + 1)[:, None], torch.randint(0, 3, (n,))
    x[list(spoilt)] = torch.nan
    return x, y


def net(norm=True):
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8, bias=False), middle, nn.Linear(8, 3))


def filtered(model, m, chain=CHAIN, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    return Filtered(model, F.cross_entropy, chain(), optimizer, m, **options)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_accumulated_rows_follow_ordinary_backward_passes(plan):
    model = net(norm=False)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.3, momentum=0.9)
    wrapper = filtered(model, None, plan=plan)
    for k in range(3):
        x, y = vectors(9, spoilt=(2, 8) if k == 1 else ())
        wrapper.accumulate(x[:4], y[:4])
        wrapper.accumulate(x[4:5], y[4:5])
        result = wrapper.step(x[5:], y[5:])
        rows = []
        for m in range(9):
            plain.zero_grad()
            F.cross_entropy(plain(x[m : m + 1]), y[m : m + 1]).backward()
            grads = [p.grad.clone() for p in plain.parameters()]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            if norm.isfinite():
                rows.append([g * min(1, 0.5 / norm) for g in grads])
        for p, *column in zip(plain.parameters(), *rows, strict=True):
            p.grad = torch.stack(column).mean(0)
        optimizer.step()
        assert result.info["finite_filter/finite"].sum() == len(rows)
        for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["fused", "loop"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("chain", [CHAIN, SHARP])
def test_accumulated_batches_are_one_batch(plan, scaled, chain):
    model = net()
    other = copy.deepcopy(model)
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    a = filtered(model, 2, chain, plan=plan, scaler=scaler())
    b = filtered(other, 6, chain, plan=plan, scaler=scaler())
    for _ in range(3):
        x, y = vectors(18)
        a.accumulate(x[:6], y[:6])
        a.accumulate(x[6:12], y[6:12])
        with pytest.raises(RuntimeError, match="no accumulated rows in a checkpoint, found 2"):
            a.state_dict()
        found, expected = a.step(x[12:], y[12:]), b.step(x, y)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(dict(found.info), dict(expected.info), rtol=1e-11, atol=1e-12)
        assert list(found.info) == list(expected.info)
        tensors = model.state_dict(), other.state_dict()
        torch.testing.assert_close(*map(dict, tensors), rtol=1e-11, atol=1e-12)
    a.state_dict()


@pytest.mark.parametrize("spoilt", [(0,), range(12)])
def test_what_overflows_is_rejected_alone_and_lowers_the_scale_once(spoilt):
    model = net(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wrapper = filtered(model, None, scaler=scaler)
    before = copy.deepcopy(dict(model.state_dict()))
    x, y = vectors(12)
    x[list(spoilt)] = 3e37  # the loss is finite, its scaled gradient is not
    wrapper.accumulate(x[:4], y[:4])
    result = wrapper.step(x[4:], y[4:])
    assert (~result.info["finite_filter/finite"]).sum() == len(spoilt)
    assert bool(result.info["keep"]) == (len(spoilt) < 12)
    same = all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert same == (len(spoilt) == 12)
    assert wrapper.state_dict()["transforms"] == {}


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_autocast_and_half_precision(plan):
    model = net(norm=False)
    other = copy.deepcopy(model)
    a, b = filtered(model, 2, plan=plan), filtered(other, 6, plan=plan)
    x, y = torch.randn(18, 6), torch.randint(0, 3, (18,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a.accumulate(x[:6], y[:6])
        a.accumulate(x[6:12], y[6:12])
        found, expected = a.step(x[12:], y[12:]), b.step(x, y)
    torch.testing.assert_close(dict(found.info), dict(expected.info), rtol=1e-2, atol=1e-3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3)
    half = net(norm=False).bfloat16()
    wrapper = filtered(half, 2, plan=plan)
    wrapper.accumulate(x[:6].bfloat16(), y[:6])
    wrapper.step(x[6:].bfloat16(), y[6:])
    assert half[0].weight.grad.dtype == torch.bfloat16


def test_keywords_of_the_step_are_given_to_accumulate():
    gated = lambda: gf.chain(gf.gate(gf.clip_per_row(0.1), "on"), gf.mean_rows())
    model, on = net(), torch.tensor(True)
    wrapper = filtered(model, 2, gated)
    wrapper.accumulate(*vectors(4), on=on)
    with pytest.raises(ValueError, match="keyword 'on' with one value"):
        wrapper.accumulate(*vectors(4), on=torch.tensor(False))
    result = wrapper.step(*vectors(4), on=on, other=3)
    assert result.info["clip_per_row/norm"].shape == (4,)


def test_loading_drops_what_was_accumulated_and_faults_do_not():
    model = net()
    wrapper = filtered(model, 2)
    state = wrapper.state_dict()
    wrapper.accumulate(*vectors(4))
    wrapper.load_state_dict(state)
    wrapper.accumulate(*vectors(4))
    with pytest.raises(ValueError, match="divisible"):
        wrapper.step(*vectors(5))
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"found \['2\.bias'\] in some only"):
        wrapper.accumulate(*vectors(4))
    model[2].bias.requires_grad_(True)
    assert wrapper.step(*vectors(4)).info["clip_per_row/norm"].shape == (4,)


@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
def test_accumulated_rows_hold_one_gradient(plan):
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))
    size = sum(p.nbytes for p in model.parameters())
    wrapper = filtered(model, 4, plan=plan)
    batches = [(torch.randn(4, 200), torch.arange(4)) for _ in range(12)]
    wrapper.accumulate(*batches[0])
    wrapper.step(*batches[0])  # p.grad and momentum exist
    with Peak() as memory:
        for batch in batches[1:]:
            wrapper.accumulate(*batch)
        gc.collect()
        assert memory.now < 1.1 * size
        result = wrapper.step(*batches[0])
    assert result.info["clip_per_row/norm"].shape == (48,)
    assert memory.peak < 10 * size
