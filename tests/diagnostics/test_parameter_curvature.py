"""Hessian eigenvalue and trace against the dense Hessian, and sharpness against two losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
import gradfilter.diagnostics as gd


def setting(activation=nn.Tanh):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), activation(), nn.Linear(4, 3)).eval()
    params, buffers = gf.extract(model)
    batch = 2 * torch.randn(7, 3), torch.randint(3, (7,))
    return gf.model_loss(model, F.cross_entropy), params, buffers, batch


def dense(loss, params, buffers, batch):
    sizes = [p.numel() for p in params.values()]

    def flat(vector):
        parts = vector.split(sizes)
        tree = {n: part.view_as(p) for part, (n, p) in zip(parts, params.items(), strict=True)}
        return loss(tree, batch, buffers)[0]

    return torch.func.jacrev(torch.func.jacrev(flat))(
        torch.cat([p.reshape(-1) for p in params.values()])
    )


def test_top_and_trace_of_the_dense_hessian(float64):
    loss, params, buffers, batch = setting()
    hessian = dense(loss, params, buffers, batch)
    top = gd.hessian_top(loss, params, batch, buffers=buffers, tolerance=1e-8)
    torch.testing.assert_close(top.value, torch.linalg.eigvalsh(hessian)[-1])
    assert top.residual <= 1e-8
    exact = gd.hessian_trace(loss, params, batch, probes=len(hessian))
    torch.testing.assert_close(exact.value, hessian.trace())
    assert exact.standard_error == 0
    rough = gd.hessian_trace(loss, params, batch, probes=len(hessian) - 1)
    assert 0 < rough.standard_error < hessian.diagonal().abs().sum()
    assert (rough.value - exact.value).abs() < 4 * rough.standard_error


def test_few_products_say_so_and_another_seed_starts_elsewhere(float64):
    loss, params, _, batch = setting()
    one = gd.hessian_top(loss, params, batch, iterations=1)
    assert (
        one.residual > 0.1
        and one.value != gd.hessian_top(loss, params, batch, iterations=1, seed=1).value
    )
    torch.testing.assert_close(one.value, gd.hessian_top(loss, params, batch, iterations=1).value)


def test_the_mean_of_many_estimates_is_the_trace(float64):
    loss, params, _, batch = setting()
    exact = gd.hessian_trace(loss, params, batch, probes=1000).value
    found = [gd.hessian_trace(loss, params, batch, probes=8, seed=s) for s in range(30)]
    values = torch.stack([f.value for f in found])
    error = values.std() / 30**0.5
    assert (values.mean() - exact).abs() < 4 * error
    # The standard error is that of the mean: what the values of many seeds scatter by.
    claimed = torch.stack([f.standard_error for f in found]).square().mean().sqrt()
    assert 0.6 < values.std() / claimed < 1.6


@pytest.mark.usefixtures("float64")
def test_a_plain_loss_an_unused_parameter_and_a_linear_one():
    params = {"w": torch.tensor([3.0, -1.0]), "unused": torch.ones(2), "linear": torch.ones(1)}
    loss = lambda p, batch: (batch * p["w"] ** 2).sum() + p["linear"].sum()
    top = gd.hessian_top(loss, params, torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(top.value, torch.tensor(10.0).double())
    trace = gd.hessian_trace(loss, params, torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(trace.value, torch.tensor(14.0).double())
    flat = gd.hessian_top(lambda p, batch: p["linear"].sum(), params, None)
    assert flat.value == 0 and flat.residual == 0


@pytest.mark.usefixtures("float64")
def test_the_top_is_the_largest_not_the_longest():
    loss = lambda p, batch: -10 * p["w"][0] ** 2 + p["w"][1] ** 2
    top = gd.hessian_top(loss, {"w": torch.ones(2)}, None)
    torch.testing.assert_close(top.value, torch.tensor(2.0).double())


@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
def test_sharpness_is_the_rise_over_a_sam_step(float64, rho):
    loss, params, buffers, batch = setting()
    gradient = torch.func.grad(lambda p: loss(p, batch, buffers)[0])(params)
    norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    near = {n: p + rho * gradient[n] / (norm + 1e-12) for n, p in params.items()}
    expected = loss(near, batch, buffers)[0] - loss(params, batch, buffers)[0]
    before = {n: p.clone() for n, p in params.items()}
    found = gd.sharpness(loss, params, batch, rho)
    torch.testing.assert_close(found, expected.detach())
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    assert found.shape == () and not found.requires_grad


def test_sharpness_agrees_with_the_surrogate_gap_of_the_link():
    loss, params, buffers, batch = setting()
    rows = gf.microbatch_grads(loss, 1)(params, batch, buffers=buffers)
    link = gf.sam_perturb(0.3)
    gap = link.update(rows, link.init(params), params)[2]["surrogate_gap"]
    torch.testing.assert_close(gd.sharpness(loss, params, batch, 0.3), gap, rtol=1e-4, atol=1e-6)


def test_sharpness_where_the_gradient_is_zero_and_with_dropout():
    flat = lambda p, batch: (p["w"] ** 2).sum()
    assert gd.sharpness(flat, {"w": torch.zeros(3)}, None) == 0
    # One mask for both evaluations: with rho = 0 nothing rises.
    dropped = lambda p, batch: F.dropout(p["w"], 0.5).sum()
    assert gd.sharpness(dropped, {"w": torch.randn(50)}, None, rho=0.0) == 0


def test_a_module_and_its_buffers_stay_as_they_are():
    loss, params, _, batch = setting()
    loss.model.train()  # BatchNorm would write its running statistics
    before = {n: t.clone() for n, t in loss.model.state_dict().items()}
    gd.sharpness(loss, params, batch)
    gd.hessian_top(loss, params, batch, iterations=3)
    gd.hessian_trace(loss, params, batch, probes=2)
    for name, tensor in loss.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in loss.model.parameters())
