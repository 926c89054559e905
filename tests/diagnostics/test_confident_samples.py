"""Samples that a model classifies with certainty: rounding must not turn small numbers into 0."""

import pytest
import torch

import gradfilter.diagnostics as gd
from gradfilter.diagnostics._derivative import log_loss
from gradfilter.diagnostics._jacobian import all_rows, cotangents
from gradfilter.diagnostics._operator_norm import factor_maps


@pytest.mark.parametrize("margin", [20.0, 38.0, 60.0, 100.0, -20.0, -60.0])
def test_products_find_the_curvature_of_a_confident_sample(margin):
    x = torch.tensor([[margin, 0.0]]).double()  # H = p (1 − p) [[1, −1], [−1, 1]]
    found = gd.loss_curvature(lambda x: 1 * x, x, torch.tensor([0]))
    expected = 2 * torch.exp(-x[0, :1].abs())
    torch.testing.assert_close(found.traces, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.tops, expected, rtol=1e-6, atol=0)


def test_products_find_what_the_gram_finds_in_float32():
    weight = torch.randn(5, 30)
    x = 60 * torch.randn(6, 30) / weight.norm()
    model, y = (lambda x: 4 * x @ weight.T), torch.randint(5, (6,))
    found = gd.loss_curvature(model, x, y, probes=30, iterations=30, tolerance=1e-6)
    gram = gd.loss_curvature(model, x, y, method="gauss_newton")
    torch.testing.assert_close(found.traces, gram.traces, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.tops, gram.tops, rtol=1e-4, atol=0)


def test_the_loss_is_the_cross_entropy(float64):
    z, y = 4 * torch.randn(7, 4), torch.randint(4, (7,))
    z[0] = 1.0  # ties
    expected = -z.log_softmax(1).gather(1, y[:, None]).sum()
    torch.testing.assert_close(log_loss(z, y), expected)
    one = torch.randn(3, 1, requires_grad=True)  # nothing to choose from
    value = log_loss(one, torch.zeros(3, dtype=torch.int64))
    assert value == 0 and (torch.autograd.grad(value, one)[0] == 0).all()


def test_a_small_curvature_in_many_dimensions_is_not_taken_for_none():
    weight = torch.randn(400)
    model = lambda x: torch.stack([x @ weight, 0 * x[:, 0]], 1)
    x = (50 * weight / weight.square().sum())[None]
    found = gd.loss_curvature(model, x, torch.tensor([0]))
    margin = model(x)[0, 0].double()
    expected = torch.exp(-margin) * weight.double().square().sum()
    torch.testing.assert_close(found.tops[0], expected, rtol=1e-4, atol=0)
    scale = 1e-22 * torch.linspace(1, 3, 50)
    top = gd.hessian_top(
        lambda p, batch: (scale * p["w"] ** 2).sum(), {"w": torch.ones(50)}, None, tolerance=1e-6
    )
    torch.testing.assert_close(top.value, 6e-22 * torch.ones(()).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("margin", [12.0, 30.0, 60.0])
def test_a_gradient_too_small_for_half_precision_has_its_norm(dtype, margin):
    x, y = torch.tensor([[margin, 0.0, 0.0]], dtype=dtype), torch.tensor([0])
    small = torch.exp(-torch.tensor([margin]).double())
    expected = 6**0.5 * small / (1 + 2 * small)  # p − onehot(y) = (−2, 1, 1) e^-m / (1 + 2 e^-m)
    options = {"normalization": "crossentropy", "targets": y}
    model = lambda x: 1 * x
    found = gd.jacobian_norm(model, x, **options)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for method in ("gram", "power"):
        found = gd.operator_norm(model, x, method=method, **options).values
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    found = gd.loss_curvature(model, x, y, method="gauss_newton").gradient_norms
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("normalization", ["none", "softmax", "logsoftmax", "jacobian"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_factor_as_maps_is_the_factor(float64, normalization, scale):
    logits = scale * torch.randn(5, 6)
    rows = all_rows(logits)
    matrix = cotangents(logits, normalization, rows)  # (C, N, C)
    forth, back = factor_maps(logits, normalization, rows)
    top = torch.nn.functional.one_hot(logits.argmax(1), 6).double()
    for v in (torch.randn(5, 6), top, 1e-9 * torch.randn(5, 6) + top):
        for found, entries in ((forth(v), "rnc,nc->nr"), (back(v), "rnc,nr->nc")):
            expected = torch.einsum(entries, matrix, v)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    for found, entries in ((forth(top), "rnc,nc->nr"), (back(top), "rnc,nr->nc")):
        expected = torch.einsum(entries, matrix, top)  # to the last small number
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
