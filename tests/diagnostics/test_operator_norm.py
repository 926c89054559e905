"""Operator norms against closed forms and the SVD; a sample does not depend on other samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradfilter.diagnostics as gd

METHODS = ["gram", "power", "auto"]


def linear(weight):
    return lambda x: x.flatten(1) @ weight.T.to(x.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("classes", "size"), [(4, 9), (9, 4), (40, 7), (1, 6), (2, 2)])
def test_a_linear_map_has_the_norm_of_its_matrix(method, classes, size):
    weight = torch.randn(classes, size, dtype=torch.float64)
    found = gd.operator_norm(linear(weight), torch.randn(3, size).double(), method=method)
    expected = torch.linalg.matrix_norm(weight, 2).expand(3)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=0)
    assert (found.residuals <= 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e-25, 1e15])
def test_a_small_or_large_norm_is_not_lost(method, scale):
    weight = scale * torch.randn(3, 8)
    found = gd.operator_norm(linear(weight), torch.randn(2, 8), method=method).values
    expected = torch.linalg.matrix_norm(weight.double(), 2).expand(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_two_layer_relu_net_has_its_closed_form(method, float64):
    first, second = nn.Linear(6, 11), nn.Linear(11, 4)
    x = torch.randn(5, 6)
    masks = (first(x) > 0).double()  # W₂ diag(mask) W₁
    jacobians = torch.einsum("ch,nh,hd->ncd", second.weight, masks, first.weight).detach()
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    torch.testing.assert_close(gd.input_jacobian(model, x), jacobians)
    found = gd.operator_norm(model, x, method=method).values
    torch.testing.assert_close(found, torch.linalg.matrix_norm(jacobians, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("target_only", [False, True])
@pytest.mark.parametrize(
    "normalization", ["none", "softmax", "logsoftmax", "crossentropy", "jacobian"]
)
def test_gram_and_power_and_svd_agree(normalization, target_only):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 12)).eval()
    x, y = torch.randn(4, 2, 5, 5), torch.randint(12, (4,))
    options = {"normalization": normalization, "targets": y, "target_logit_only": target_only}
    svd = torch.linalg.matrix_norm(gd.input_jacobian(model, x, **options).flatten(2).double(), 2)
    for method in METHODS:
        found = gd.operator_norm(model, x, method=method, chunk_size=5, **options)
        torch.testing.assert_close(found.values, svd, rtol=1e-4, atol=1e-12)


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 4))
def test_a_sample_does_not_depend_on_the_batch(count, iterations):
    model = nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 8)).eval().double()
    x, seeds = torch.randn(count, 9).double(), torch.arange(10, 10 + count)
    options = {"method": "power", "iterations": iterations + 1, "tolerance": 1e-2}
    together = gd.operator_norm(model, x, seed=seeds, **options)
    for i in range(count):
        alone = gd.operator_norm(model, x[i : i + 1], seed=10 + i, **options)
        torch.testing.assert_close(together.values[i], alone.values[0])
        torch.testing.assert_close(together.residuals[i], alone.residuals[0])


def test_the_latest_value_is_kept_and_says_how_far_it_is():
    weight = torch.diag(torch.linspace(0.9, 1.0, 60)).double()
    x = torch.randn(1, 60).double()
    values, residuals = [], []
    for iterations in (1, 3, 8, 60):
        options = {"method": "power", "iterations": iterations, "tolerance": 0.0}
        found = gd.operator_norm(linear(weight), x, **options)
        values.append(found.values.item())
        residuals.append(found.residuals.item())
    assert values == sorted(values) and values[0] < 0.99 and values[-1] == pytest.approx(1)
    assert residuals[0] > 1e-2 and residuals[-1] < 1e-6
    other = gd.operator_norm(linear(weight), x, method="power", iterations=1, seed=7)
    assert other.values.item() != values[0]


def test_no_worse_than_power_iteration_with_as_many_products():
    weight = torch.randn(30, 50, dtype=torch.float64)
    u = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(6):
        u = weight @ (weight.T @ u / u.norm())
    plain = (weight.T @ u / u.norm()).norm()
    options = {"method": "power", "iterations": 7, "tolerance": 0.0}
    found = gd.operator_norm(linear(weight), torch.zeros(1, 50).double(), **options)
    assert found.values[0] >= plain and found.values[0] <= torch.linalg.matrix_norm(weight, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_that_is_not_finite_spoils_no_other(method):
    weight, x = torch.randn(40, 6), torch.randn(3, 6)
    x[1] = torch.nan
    found = gd.operator_norm(lambda x: linear(weight)(x.square()), x, method=method)
    assert found.values.isnan().tolist() == [False, True, False]
    assert found.residuals.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6,), (2, 3, 5), (1, 2, 4, 4)])
def test_samples_may_share_memory(method, shape):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 5), nn.Tanh(), nn.Linear(5, 40)
    ).eval()
    x = torch.randn(1, *shape).expand(3, *[-1] * len(shape))
    dense = gd.operator_norm(model, x.clone(), method=method).values
    torch.testing.assert_close(gd.operator_norm(model, x, method=method).values, dense)
    windows = torch.randn(20).unfold(0, 8, 3)  # (5, 8), overlapping
    found = gd.operator_norm(linear(torch.randn(3, 8)), windows, method=method).values
    assert len(found) == 5 and found.isfinite().all()
