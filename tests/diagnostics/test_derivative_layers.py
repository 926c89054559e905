"""Diagnostics of models with activation checkpoints, recurrent layers and dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
import gradfilter.diagnostics as gd


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Sequences(nn.Module):
    """The last step of a recurrent layer."""

    def __init__(self, kind, classes=3):
        super().__init__()
        self.layer = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


PARAMETER_MEASURES = [
    lambda *a: gd.sharpness(*a, 0.3),
    lambda *a: gd.hessian_top(*a).value,
    lambda *a: gd.hessian_trace(*a, probes=4).value,
]


@pytest.mark.parametrize("measure", PARAMETER_MEASURES)
def test_what_is_checkpointed_is_measured_at_the_parameters_given(measure):
    inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(6, 3), torch.randint(3, (6,))
    found = []
    for model in (nn.ModuleDict({"inner": inner}), Checkpointed(inner)):
        model.forward = inner.forward if isinstance(model, nn.ModuleDict) else model.forward
        params = {name: 2 * p for name, p in gf.extract(model)[0].items()}
        found.append(measure(gf.model_loss(model, F.cross_entropy), params, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_with_trainable_parameters(kind):
    model, x, y = Sequences(kind).eval(), torch.randn(3, 6, 4), torch.tensor([0, 2, 1])
    whole = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)  # (C, N, T, 4)
    jacobian = whole.transpose(0, 1)
    torch.testing.assert_close(gd.input_jacobian(model, x), jacobian)
    norms = torch.linalg.matrix_norm(jacobian.flatten(2), 2).double()
    for method in ("gram", "power"):
        found = gd.operator_norm(model, x, method=method).values
        torch.testing.assert_close(found, norms, rtol=1e-4, atol=0)
    exact = gd.loss_curvature(model, x, y, probes=24)
    hessian = torch.autograd.functional.hessian(
        lambda x: F.cross_entropy(model(x), y, reduction="sum"), x
    ).reshape(72, 72)
    traces = hessian.diagonal().reshape(3, 24).double().sum(1)
    torch.testing.assert_close(exact.traces, traces, rtol=1e-4, atol=1e-6)
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("measure", PARAMETER_MEASURES)
def test_dropout_leaves_the_global_generator_alone(measure):
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 3)).train()
    loss, params = gf.model_loss(model, F.cross_entropy), gf.extract(model)[0]
    before = torch.get_rng_state()
    measure(loss, params, (torch.randn(6, 3, generator=torch.Generator()), torch.arange(6) % 3))
    assert torch.equal(torch.get_rng_state(), before)
