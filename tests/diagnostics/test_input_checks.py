"""Wrong arguments of the diagnostics: errors that say what is wrong, why, and how to fix it."""

import pytest
import torch
from torch import nn

import gradfilter.diagnostics as gd

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 1])
MODEL = nn.Linear(4, 2).eval()
SQUARE = lambda params, batch: (params["w"] ** 2).sum()
PARAMS = {"w": torch.ones(3)}
ROWS = {"w": torch.randn(3, 4)}
MEASURES = [gd.input_jacobian, gd.jacobian_norm, gd.operator_norm]


@pytest.mark.parametrize("measure", [*MEASURES, lambda m, x: gd.loss_curvature(m, x, Y)])
def test_a_module_in_training_mode_is_refused_and_left_alone(measure):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"evaluation mode.*BatchNorm.*model\.eval\(\)"):
        measure(model, X)
    assert model.training
    model.eval()
    model[1].train()  # one part is enough to mix samples
    with pytest.raises(ValueError, match="evaluation mode"):
        measure(model, X)
    measure(model.eval(), X)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("model", "x", "options", "error", "match"),
    [
        (3, X, {}, TypeError, "`model`.*found int"),
        (MODEL, X.long(), {}, TypeError, "floating-point.*int64"),
        (MODEL, [1.0], {}, TypeError, "floating-point.*list"),
        (MODEL, X[0, 0], {}, ValueError, r"\(N, \*shape\).*x\[None\]"),
        (MODEL, X[:0], {}, ValueError, r"\(0, 4\)"),
        (lambda x: x.sum(), X, {}, ValueError, r"logits of shape \(3, C\), found \(\)"),
        (lambda x: x[:2], X, {}, ValueError, r"logits of shape \(3, C\)"),
        (lambda x: (x,), X, {}, TypeError, "logits as a tensor.*tuple.*Wrap"),
        (MODEL, X, {"normalization": "max"}, ValueError, "none, softmax.*'max'"),
        (MODEL, X, {"normalization": "crossentropy"}, ValueError, "`targets` with crossent"),
        (MODEL, X, {"target_logit_only": True}, ValueError, "`targets` with target_logit_only"),
        (MODEL, X, {"chunk_size": 0}, ValueError, "`chunk_size` >= 1.*None"),
    ],
)
def test_models_samples_and_options(measure, model, x, options, error, match):
    with pytest.raises(error, match=match) as raised:
        measure(model, x, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ([0, 1, 1], TypeError, "class numbers, found list"),
        (Y.float(), TypeError, "class numbers.*float32"),
        (Y[:2], ValueError, r"\(3,\), found \(2,\)"),
        (Y + 1, ValueError, r"0 \.\. 1, found 1 \.\. 2"),
        (Y - 1, ValueError, r"found -1 \.\. 0"),
    ],
)
def test_targets(targets, error, match):
    with pytest.raises(error, match=match):
        gd.input_jacobian(MODEL, X, normalization="crossentropy", targets=targets)
    with pytest.raises(error, match=match):
        gd.loss_curvature(MODEL, X, targets)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gd.operator_norm(MODEL, X, method="svd"), "auto, gram, power.*'svd'"),
        (lambda: gd.operator_norm(MODEL, X, iterations=0), "`iterations` >= 1"),
        (lambda: gd.operator_norm(MODEL, X, tolerance=-1.0), "`tolerance` >= 0"),
        (lambda: gd.operator_norm(MODEL, X, method="power", seed=[1]), "or 3 of them.*found 1"),
        (lambda: gd.loss_curvature(MODEL, X, Y, method="exact"), "hvp, gauss_newton"),
        (lambda: gd.loss_curvature(MODEL, X, Y, probes=1), "`probes` >= 2"),
        (lambda: gd.hessian_top(SQUARE, PARAMS, None, iterations=0), "`iterations` >= 1"),
        (lambda: gd.hessian_top(SQUARE, PARAMS, None, tolerance=float("nan")), "`tolerance`"),
        (lambda: gd.hessian_top(SQUARE, {}, None), "at least one parameter"),
        (lambda: gd.hessian_trace(SQUARE, PARAMS, None, probes=0), "`probes` >= 2"),
        (lambda: gd.hessian_trace(lambda p, b: torch.ones(()), PARAMS, None), "depends on the"),
        (lambda: gd.sharpness(lambda p, b: p["w"], PARAMS, None), "scalar loss"),
        (lambda: gd.sharpness(SQUARE, PARAMS, None, rho=-0.1), "`rho` >= 0"),
        (lambda: gd.sharpness(SQUARE, {"w": torch.ones(3).bfloat16()}, None), "float32.*autocast"),
        (lambda: gd.sharpness(SQUARE, {**PARAMS, "v": torch.ones(2).half()}, None), "'v' in"),
        (lambda: gd.noise_scale(ROWS, 0), "`batch_size` >= 1"),
    ],
)
def test_numbers_and_words(call, match):
    with pytest.raises(ValueError, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gd.sharpness(3, PARAMS, None),
        lambda: gd.sharpness(SQUARE, PARAMS, None, buffers={"b": torch.ones(1)}),
        lambda: gd.agreement([torch.ones(3)]),
        lambda: gd.noise_scale(torch.ones(3), 1),
    ],
)
def test_things_of_another_kind(call):
    with pytest.raises(TypeError, match="Expected"):
        call()


@pytest.mark.parametrize("measure", [gd.hessian_top, gd.hessian_trace])
def test_a_loss_that_uses_other_parameters_than_its_own_is_refused(measure):
    elsewhere = lambda params, batch: nn.functional.cross_entropy(MODEL(batch[0]), batch[1])
    with pytest.raises(ValueError, match=r"depends on the parameters.*functional_call"):
        measure(elsewhere, PARAMS, (X, Y))
