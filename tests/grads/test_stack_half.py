"""Weights and factors multiply half-precision rows in float32: small products do not vanish."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf

PLANS = ("fused", "loop", "vmap")
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def problem(dtype, size=1e4):
    """Rows of norm about ``size``, whose weights are as much smaller."""
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    x, y = (torch.randn(8, 4) / 8).to(dtype), torch.arange(8) % 3
    criterion = lambda o, y: size * F.cross_entropy(o, y)
    return model.to(dtype), criterion, x, y


def by_hand(model, criterion, x, y, weights):
    """Ordinary backward passes in float64 from the same rounded numbers."""
    exact = nn.Linear(4, 3).double()
    exact.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    total = [torch.zeros_like(p) for p in exact.parameters()]
    for m, w in enumerate(weights.tolist()):
        rows = slice(2 * m, 2 * m + 2)
        loss = criterion(exact(x[rows].double()), y[rows])
        for t, g in zip(total, torch.autograd.grad(loss, list(exact.parameters())), strict=True):
            t.add_(g, alpha=w)
    return dict(zip(("weight", "bias"), total, strict=True))


def assert_near(found, expected, dtype):
    """Within the rounding of a forward and a backward pass through one layer in half precision."""
    for name, want in expected.items():
        error = (found[name].double() - want).norm() / want.norm()
        assert found[name].dtype == dtype
        assert error < 16 * HALF[dtype], (name, error)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1.0])
@pytest.mark.parametrize("asked", ["first", "after a Gram", "scaled"])
def test_small_weights_of_large_rows_count(dtype, plan, size, asked):
    model, criterion, x, y = problem(dtype, 1e4 if size < 1 else 1.0)
    weights = size * torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    expected = by_hand(model, criterion, x, y, weights)
    rows = gf.microbatch_grads(gf.model_loss(model, criterion), 4, plan=plan)(
        gf.extract(model)[0], (x, y)
    )
    if asked == "after a Gram":
        rows.gram()
    found = (
        rows.scaled(weights).combine(torch.ones(4, dtype=dtype))
        if asked == "scaled"
        else rows.combine(weights)
    )
    if dtype == torch.float16 and size == 1e-8:  # the result itself is below half precision
        assert all((leaf.abs() < 1e-3).all() and leaf.any() for leaf in found.values())
        expected = {name: leaf.half().double() for name, leaf in expected.items()}
        tiny = 2.0**-24
        for name, leaf in found.items():
            assert (leaf.double() - expected[name]).abs().max() <= 2 * tiny
    else:
        assert_near(found, expected, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plan", PLANS)
def test_rows_with_small_factors_are_given_as_they_are(dtype, plan):
    model, criterion, x, y = problem(dtype)
    factors = torch.tensor([1e-8, 1.0, 1.0, 1.0], dtype=torch.float64)
    rows = gf.microbatch_grads(gf.model_loss(model, criterion), 4, plan=plan)(
        gf.extract(model)[0], (x, y)
    )
    unscaled = rows.stacked()["weight"][0].double()
    got = rows.scaled(factors).stacked()["weight"][0].double()
    assert got.any()
    assert (got - 1e-8 * unscaled).abs().max() <= max(2.0**-25, HALF[dtype] * 1e-8 * 1e4)
    assert rows.scaled(factors.to(dtype)).scaled(torch.full((4,), 1e4)).sq_norms()[1] > 0


def test_a_unit_that_is_clipped_hard_is_not_lost_in_float16():
    params = {"w": torch.full((2, 3), 1e-3).half()}
    grads = {"w": torch.tensor([[3e4, 0.0, 4e4], [1.0, 0.0, 0.0]]).half()}
    clipped = gf.agc_clip(0.01).update(grads, {}, params)[0]["w"]
    limit = 0.01 * params["w"].double()[0].norm()
    expected = grads["w"].double() * (limit / grads["w"].double().norm(dim=1, keepdim=True))
    assert clipped.dtype == torch.float16
    torch.testing.assert_close(clipped.double(), expected, rtol=2e-3, atol=2.0**-24)
