"""Rows at other parameters than the module's own, which must not reach the result.

From the second step on, rows are always at other parameters. The reference is the loop on a copy of
the module with these parameters, in which own and given parameters are equal.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
from _zoo import every_case
from _zoo_case import Case, Net, inputs

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Fell back to plan:UserWarning"),
]
PLANS = [("loop", 2), ("auto", 1), ("auto", 2)]


def moved(model):
    params, buffers = gf.extract(model)
    g = torch.Generator().manual_seed(5)
    shift = lambda p: 0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return {name: p + shift(p) for name, p in params.items()}, buffers


def rows_at(case, model, params, buffers, batch, plan, m):
    loss = gf.model_loss(model, case.criterion, has_aux=case.has_aux)
    return gf.microbatch_grads(loss, m, plan=plan)(params, batch, buffers=buffers)


def assert_no_leak(case, plan, m):
    model, batch = case.model(), case.samples(m, 3)
    params, buffers = moved(model)
    before = copy.deepcopy(model.state_dict())
    settled = copy.deepcopy(model)
    gf.insert(settled, params, buffers)
    torch.manual_seed(0)
    want = rows_at(case, settled, params, buffers, batch, "loop", m)
    torch.manual_seed(0)
    got = rows_at(case, model, params, buffers, batch, plan, m)
    rtol = max(case.rtol, 1e-9)
    scale = sum(leaf.norm() for leaf in want.stacked().values())
    for name, leaf in want.stacked().items():
        torch.testing.assert_close(got.stacked()[name], leaf, rtol=rtol, atol=rtol * float(scale))
    weights = torch.linspace(0.5, 1, m)
    torch.testing.assert_close(
        got.combine(weights), want.combine(weights), rtol=rtol, atol=rtol * float(scale)
    )
    torch.testing.assert_close(got.buffers, want.buffers, rtol=1e-9, atol=1e-11)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("plan", "m"), PLANS)
@every_case
def test_every_model_of_the_zoo(case, plan, m):
    assert_no_leak(case, plan, m)


def checkpointed_norm():
    run = lambda net, x: net.out(checkpoint(net.block, net.a(x), use_reentrant=False))
    block = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6))
    return Net(run, a=nn.Linear(6, 6), block=block, out=nn.Linear(6, 3))


@pytest.mark.parametrize(("plan", "m"), PLANS)
def test_activation_checkpoints_call_the_module_again_as_it_was_in_the_pass(plan, m):
    case = Case("checkpointed-norm", checkpointed_norm, inputs(6))
    assert_no_leak(case, plan, m)
    plain = case.model()
    plain.run = lambda net, x: net.out(net.block(net.a(x)))
    params, buffers = moved(plain)
    batch = case.samples(m, 3)
    want = rows_at(case, plain, params, buffers, batch, "loop", m)
    got = rows_at(case, case.model(), params, buffers, batch, plan, m)
    torch.testing.assert_close(got.stacked(), want.stacked(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.buffers, want.buffers, rtol=1e-12, atol=0)


def test_activation_checkpoints_keep_the_mode_of_the_pass():
    case = Case("checkpointed-norm", checkpointed_norm, inputs(6))
    model = case.model()
    params, buffers = moved(model)
    rows = rows_at(case, model, params, buffers, case.samples(1, 3), "fused", 1)
    want = rows_at(case, model, params, buffers, case.samples(1, 3), "loop", 1).stacked()
    model.eval()
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-9, atol=1e-11)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("plan", "m"), PLANS)
def test_an_embedding_that_renormalises_leaves_the_given_parameters_alone(plan, m):
    """If it wrote them, a pure update would start elsewhere than a plain loop: it is refused."""
    build = lambda: nn.Sequential(nn.Embedding(11, 4, max_norm=0.5), nn.Tanh(), nn.Flatten())
    case = Case("max-norm", build, lambda n: (torch.arange(n * 6).view(n, 6) % 11, torch.arange(n)))
    model = case.model()
    params, buffers = moved(model)
    given = copy.deepcopy(params)
    with pytest.raises(ValueError, match=r"'0\.weight' renormalised in the forward pass"):
        rows_at(case, model, params, buffers, case.samples(m, 3), plan, m)
    assert all(torch.equal(params[name], value) for name, value in given.items())
    params["0.weight"] = params["0.weight"].renorm(2, 0, 0.49)
    rows = rows_at(case, model, params, buffers, case.samples(m, 3), plan, m)
    gf.insert(model, params, buffers)
    for x, y in zip(*(t.chunk(m) for t in case.samples(m, 3)), strict=True):
        case.criterion(model(x), y).backward()
    torch.testing.assert_close(rows.combine(torch.ones(m))["0.weight"], model[0].weight.grad)
    longer = {name: 3 * p for name, p in params.items()}  # a point nearby, for one gradient
    assert rows.at(longer).losses.isfinite().all()


class Caching(nn.Module):
    """Fills a buffer in evaluation mode only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("cache", None)

    def forward(self, x):
        if not self.training:
            self.cache = x.detach()
        return self.linear(x)


@pytest.mark.parametrize(("plan", "m"), PLANS)
def test_a_buffer_the_user_filled_since_is_the_users(plan, m):
    case = Case("caching", Caching, inputs(6))
    model, (x, y) = case.model(), case.samples(m, 3)
    params, buffers = moved(model)
    rows = rows_at(case, model, params, buffers, (x, y), plan, m)
    model.eval()
    model(x)
    cached = model.cache
    rows.at(params).gram()
    assert model.cache is cached
