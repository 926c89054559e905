"""Curvature in the input against dense Hessians and, for ReLU networks, the Gauss-Newton matrix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter.diagnostics as gd


def dense(model, x, y):
    """Every sample's whole Hessian, and its gradient's norm."""

    def loss(sample, target):
        return F.cross_entropy(model(sample[None]), target[None])

    hessians = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(loss)))(x, y).detach()
    slopes = torch.func.vmap(torch.func.grad(loss))(x, y).detach().flatten(1).norm(dim=1)
    size = x[0].numel()
    return hessians.reshape(len(x), size, size), slopes


def images(count=4, classes=5):
    return 3 * torch.randn(count, 2, 3, 3), torch.randint(classes, (count,))


def net(activation, classes=5):
    hidden = nn.Linear(18, 12)
    return nn.Sequential(nn.Flatten(), hidden, activation, nn.Linear(12, classes)).eval()


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_products_give_the_dense_hessian(float64, activation):
    model, (x, y) = net(activation), images()
    hessians, slopes = dense(model, x, y)
    found = gd.loss_curvature(model, x, y, probes=18, iterations=18, tolerance=1e-9)
    torch.testing.assert_close(found.gradient_norms, slopes)
    torch.testing.assert_close(found.traces, hessians.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(found.tops, torch.linalg.eigvalsh(hessians)[:, -1])
    assert (found.trace_errors == 0).all() and (found.residuals < 1e-6).all()


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_relu_nets_have_the_gauss_newton_hessian(float64, scale):
    model, (x, y) = net(nn.ReLU()), images()
    x = scale * x
    hessians, slopes = dense(model, x, y)
    jacobian = gd.input_jacobian(model, x).flatten(2)
    p = model(x).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(jacobian.mT @ middle @ jacobian, hessians)  # JᵀAJ
    found = gd.loss_curvature(model, x, y, method="gauss_newton", chunk_size=2)
    torch.testing.assert_close(found.gradient_norms, slopes)
    torch.testing.assert_close(found.traces, hessians.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(found.tops, torch.linalg.eigvalsh(hessians)[:, -1])
    by_products = gd.loss_curvature(model, x, y, probes=18, tolerance=1e-9)
    torch.testing.assert_close(found.tops, by_products.tops)
    torch.testing.assert_close(found.traces, by_products.traces)


def test_elsewhere_gauss_newton_leaves_the_logits_curvature_out(float64):
    model, (x, y) = net(nn.Tanh()), images()
    hvp = gd.loss_curvature(model, x, y, probes=18)
    gauss_newton = gd.loss_curvature(model, x, y, method="gauss_newton")
    assert ((hvp.traces - gauss_newton.traces).abs() > 1e-3).any()


def test_a_top_eigenvalue_is_the_largest_not_the_longest(float64):
    # ℓ = log(1 + e^(−q/2·x²)) has H = −q/2 at 0: nothing is above.
    def model(x):
        half = 0.5 * x.square() @ torch.tensor([[3.0], [1.0]])
        return torch.cat([half, 0 * half], 1)

    found = gd.loss_curvature(model, torch.zeros(1, 2), torch.tensor([0]))
    torch.testing.assert_close(found.tops, torch.tensor([-0.5]))
    torch.testing.assert_close(found.traces, torch.tensor([-2.0]))


def test_probes_estimate_the_trace_within_their_error(float64):
    model, (x, y) = net(nn.Tanh()), images(8)
    exact = gd.loss_curvature(model, x, y, probes=18).traces
    found = gd.loss_curvature(model, x, y, probes=12, seed=range(8))
    assert (found.trace_errors > 0).all()
    scores = (found.traces - exact) / found.trace_errors
    assert scores.abs().max() < 5 and scores.square().mean() > 0.1


def test_a_sample_does_not_depend_on_the_batch(float64):
    model, (x, y) = net(nn.Tanh()), images(5)
    options = {"probes": 3, "iterations": 6, "tolerance": 1e-2}
    together = gd.loss_curvature(model, x, y, seed=torch.arange(5), **options)
    for i in range(5):
        alone = gd.loss_curvature(model, x[i : i + 1], y[i : i + 1], seed=i, **options)
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i])


def test_a_confident_sample_has_the_curvature_it_has():
    x = torch.tensor([[30.0, 0.0]])  # H = p (1 − p) [[1, −1], [−1, 1]]
    expected = torch.exp(torch.tensor([-30.0]).double())
    for method in ("hvp", "gauss_newton"):
        found = gd.loss_curvature(lambda x: 1 * x, x, torch.tensor([0]), method=method)
        for value, factor in ((found.gradient_norms, 2**0.5), (found.traces, 2), (found.tops, 2)):
            torch.testing.assert_close(value, factor * expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["hvp", "gauss_newton"])
def test_a_flat_loss_and_one_that_is_not_finite(method):
    x = torch.tensor([[0.0, 0.0], [torch.nan, 1.0]])
    found = gd.loss_curvature(lambda x: x @ torch.eye(2), x, torch.tensor([0, 1]), method=method)
    assert found.tops.isnan().tolist() == [False, True]
    flat = gd.loss_curvature(lambda x: torch.zeros(len(x), 3), x, torch.tensor([0, 2]))
    for value in flat:
        assert (value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_vectors_in_float32(dtype):
    model, (x, y) = net(nn.ReLU()), images()
    x, model = x.to(dtype), model.to(dtype)
    options = {"probes": 18, "iterations": 18, "tolerance": 1e-3}
    half = gd.loss_curvature(model, x, y, **options)
    same = gd.loss_curvature(model.float(), x.float(), y, **options)
    torch.testing.assert_close(half.tops, same.tops, rtol=0.03, atol=1e-3)
    torch.testing.assert_close(half.traces, same.traces, rtol=0.03, atol=1e-3)
    assert half.residuals.max() < 0.02


@pytest.mark.parametrize("method", ["hvp", "gauss_newton"])
def test_targets_of_any_whole_type(method):
    many, x = nn.Linear(4, 300).eval(), torch.randn(3, 4)
    y = torch.tensor([0, 1, 127])
    expected = gd.loss_curvature(many, x, y, method=method, probes=4)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        found = gd.loss_curvature(many, x, y.to(dtype), method=method, probes=4)
        torch.testing.assert_close(found.traces, expected.traces)
    few, yes = nn.Linear(4, 2).eval(), torch.tensor([True, False, True])
    found = gd.loss_curvature(few, x, yes, method=method, probes=4).traces
    torch.testing.assert_close(
        found, gd.loss_curvature(few, x, yes.long(), method=method, probes=4).traces
    )
    with pytest.raises(ValueError, match=r"0 \.\. 4, found 0 \.\. 127"):
        gd.loss_curvature(nn.Linear(4, 5).eval(), x, y.to(torch.uint8), method=method)


@pytest.mark.parametrize("make", [torch.tensor, np.int64, np.array])
def test_a_seed_may_be_any_whole_number(make):
    model, (x, y) = net(nn.Tanh()), images()
    options = {"probes": 3, "iterations": 2}
    expected = gd.loss_curvature(model, x, y, seed=3, **options)
    for found in (
        gd.loss_curvature(model, x, y, seed=make(3), **options),
        gd.loss_curvature(model, x, y, seed=[make(3)] * 4, **options),
        gd.loss_curvature(model, x, y, seed=np.full(4, 3), **options),
    ):
        torch.testing.assert_close(found.tops, expected.tops)
        torch.testing.assert_close(found.traces, expected.traces)
