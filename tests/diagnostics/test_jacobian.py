"""Input Jacobians against `jacrev`, for every normalisation, chunk size and scale."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradfilter.diagnostics as gd
from gradfilter.diagnostics._derivative import derivative

NORMALIZATIONS = ["none", "softmax", "logsoftmax", "crossentropy", "jacobian"]
CLASSES, SIDE = 5, 4


def smooth_net(classes=CLASSES):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * SIDE * SIDE, 7),
        nn.GELU(),
        nn.Linear(7, classes),
    ).eval()


def batch(count=3, classes=CLASSES):
    return 2 * torch.randn(count, 2, SIDE, SIDE), torch.randint(classes, (count,))


def normalised(model, normalization, target_only):
    """One sample's g, by the definitions, for jacrev."""

    def g(sample, y):
        logits = model(sample[None])[0]
        if normalization == "crossentropy":
            return nn.functional.cross_entropy(logits[None], y[None])[None]
        made = {
            "softmax": logits.softmax(0),
            "logsoftmax": logits.log_softmax(0),
        }.get(normalization, logits)
        return made[y][None] if target_only else made

    return g


def naive(model, x, y, normalization, target_only):
    """Sample by sample; "jacobian" by the whole Jacobian's own norm."""
    rows = []
    for sample, target in zip(x, y, strict=True):
        own = target_only and normalization != "jacobian"
        jacobian = torch.func.jacrev(normalised(model, normalization, own))(sample, target)
        if normalization == "jacobian":
            jacobian = jacobian / jacobian.square().sum().sqrt()
            jacobian = jacobian[target][None] if target_only else jacobian
        rows.append(jacobian.detach())
    return torch.stack(rows)


@pytest.mark.parametrize("target_only", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normalisation_equals_jacrev(float64, normalization, target_only):
    model, (x, y) = smooth_net(), batch()
    options = {"normalization": normalization, "targets": y, "target_logit_only": target_only}
    expected = naive(model, x, y, normalization, target_only)
    jacobian = gd.input_jacobian(model, x, **options)
    assert jacobian.shape == expected.shape and jacobian.is_contiguous()
    torch.testing.assert_close(jacobian, expected)
    norms = expected.flatten(1).norm(dim=1)
    torch.testing.assert_close(gd.jacobian_norm(model, x, **options), norms)


@settings(max_examples=15)
@given(
    count=st.integers(2, 4),
    chunk=st.integers(1, CLASSES + 1),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_samples_do_not_mix_whatever_the_chunk(count, chunk, normalization):
    model, (x, y) = smooth_net().double(), batch(count)
    x = x.double()
    options = {"normalization": normalization, "chunk_size": chunk}
    chunked = gd.input_jacobian(model, x, targets=y, **options)
    alone = [
        gd.input_jacobian(model, x[i : i + 1], targets=y[i : i + 1], normalization=normalization)
        for i in range(count)
    ]
    torch.testing.assert_close(chunked, torch.cat(alone))
    norms = gd.jacobian_norm(model, x, targets=y, **options)
    torch.testing.assert_close(norms, chunked.flatten(1).norm(dim=1))


class Counted(torch.autograd.Function):
    """The identity, which counts what is pulled back through it."""

    generate_vmap_rule = True
    pulled = 0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        Counted.pulled += 1
        return grad


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, CLASSES),
        ({"normalization": "softmax"}, CLASSES),
        ({"normalization": "crossentropy"}, 1),
        ({"target_logit_only": True}, 1),
        ({"normalization": "logsoftmax", "target_logit_only": True}, 1),
    ],
)
def test_no_row_is_computed_that_is_not_asked_for(options, passes):
    Counted.pulled, forwards = 0, []
    net, (x, y) = smooth_net(), batch()

    def model(x):
        forwards.append(1)
        return net(Counted.apply(x))

    gd.jacobian_norm(model, x, targets=y, chunk_size=1, **options)
    assert (Counted.pulled, len(forwards)) == (passes, 1)


def test_a_module_is_not_changed_and_no_parameter_gets_a_gradient():
    model, (x, y) = smooth_net(), batch()
    before = copy.deepcopy(model.state_dict())
    x.requires_grad_()
    for found in (
        gd.input_jacobian(model, x),
        gd.jacobian_norm(model, x, normalization="crossentropy", targets=y),
        gd.operator_norm(model, x, method="power").values,
        gd.loss_curvature(model, x, y, probes=2, iterations=2).tops,
    ):
        assert not found.requires_grad
    # The graph of the input is kept, that of the parameters is not.
    assert derivative(model, x).logits.grad_fn is None
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_under_no_grad_it_is_the_same():
    model, (x, _) = smooth_net(), batch()
    with torch.no_grad():
        inside = gd.input_jacobian(model, x)
    torch.testing.assert_close(inside, gd.input_jacobian(model, x))


class Viewing(nn.Module):
    """Code that takes the usual memory order for granted."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(len(x), -1))


def test_a_model_may_view_its_images():
    model, (x, _) = Viewing().eval().double(), batch()
    x = x.double()
    expected = torch.func.vmap(torch.func.jacrev(lambda s: model(s[None])[0]))(x).detach()
    torch.testing.assert_close(gd.input_jacobian(model, x), expected)
    power = gd.operator_norm(model, x, method="power", tolerance=1e-8).values
    torch.testing.assert_close(power, torch.linalg.matrix_norm(expected.flatten(2), 2))


def test_a_zero_jacobian_stays_finite():
    flat, x = lambda x: 0 * x, torch.randn(2, 3)
    for normalization in NORMALIZATIONS:
        options = {"normalization": normalization, "targets": torch.tensor([0, 2])}
        assert (gd.input_jacobian(flat, x, **options) == 0).all()
        assert (gd.jacobian_norm(flat, x, **options) == 0).all()
        for method in ("gram", "power"):
            assert (gd.operator_norm(flat, x, method=method, **options).values == 0).all()


def test_a_tiny_jacobian_still_has_its_direction():
    scale = torch.tensor([1e-30, 1.0])[:, None]
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    jacobian = gd.input_jacobian(lambda x: scale * x, x, normalization="jacobian")
    torch.testing.assert_close(jacobian[0], jacobian[1])
    torch.testing.assert_close(jacobian.flatten(1).norm(dim=1), torch.ones(2))
    torch.testing.assert_close(
        gd.jacobian_norm(lambda x: scale * x, x), 2**0.5 * scale[:, 0].double()
    )


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_a_confident_sample_has_the_gradient_it_has(margin):
    # ∂ℓ/∂x = p − onehot(y) with p_y = 1/(1 + 2 e^-m), which float32 cannot tell from 1.
    x, small = torch.tensor([[margin, 0.0, 0.0]]), torch.exp(-torch.tensor(margin).double())
    p = torch.stack([1 + 0 * small, small, small]) / (1 + 2 * small)
    expected = p - torch.tensor([1.0, 0, 0])
    expected[0] = -2 * small / (1 + 2 * small)
    options = {"targets": torch.tensor([0])}
    gradient = gd.input_jacobian(lambda x: 1 * x, x, normalization="crossentropy", **options)
    torch.testing.assert_close(gradient[0, 0].double(), expected, rtol=1e-6, atol=0)
    softmax = gd.input_jacobian(lambda x: 1 * x, x, normalization="softmax")[0].double()
    torch.testing.assert_close(softmax[0], -p[0] * expected, rtol=1e-6, atol=0)


def test_half_precision_and_attention_go_through():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    head = nn.Linear(8, 40).eval()
    model = nn.Sequential(layer, nn.AdaptiveAvgPool1d(8), nn.Flatten(), nn.Linear(24, 40)).eval()
    x = torch.randn(2, 3, 8)
    gram = gd.operator_norm(model, x, method="gram").values
    torch.testing.assert_close(gd.operator_norm(model, x).values, gram, rtol=1e-4, atol=0)
    assert torch.backends.mha.get_fastpath_enabled()
    half = gd.input_jacobian(head.bfloat16(), x[:, 0].bfloat16())
    assert half.dtype == torch.bfloat16 and gd.jacobian_norm(head, x[:, 0].bfloat16()).min() > 0
