"""`watch` against its formulas on rows in memory, and where its numbers appear."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import BAD, assert_close, flat, normal, random_matrix, unflat, zeros
from gradfilter.diagnostics import noise_scale

MIXED = ("plain",) * 5 + ("zero", *BAD)
seeds = st.integers(0, 2**20)


def statistics_of(matrix):
    """Trace, squared norm and cosine from the definition, pair by pair."""
    rows = [row for row in matrix if row.isfinite().all()]
    m = len(rows)
    if m < 2:
        return None, None, math.nan
    mean = torch.stack(rows).mean(0)
    trace = sum((row - mean).square().sum() for row in rows).item() / (m - 1)
    pairs = [(rows[i], rows[j]) for i in range(m) for j in range(m) if i != j]
    lengths = sum((a.norm() * b.norm()).item() for a, b in pairs)
    cosine = sum((a @ b).item() for a, b in pairs) / lengths if lengths else math.nan
    return trace, mean.square().sum().item() - trace / m, cosine


@given(seeds, st.integers(1, 7), st.sampled_from([0.0, 0.5, 0.95]))
def test_random_stacks_follow_the_definition(seed, count, decay):
    watch, params = gf.watch(decay=decay), zeros()
    state, averages = watch.init(params), [0.0, 0.0]
    for step in range(3):
        matrix = random_matrix(seed + step, count, MIXED)
        rows, state, out = watch.update(gf.DenseStack(unflat(matrix)), state, params)
        assert_close(flat(rows.stacked(), batch_dims=1), matrix)
        trace, sq_norm, cosine = statistics_of(matrix)
        if trace is not None:
            averages = [
                decay * old + (1 - decay) * new
                for old, new in zip(averages, (trace, sq_norm), strict=True)
            ]
        size = max(abs(averages[0]), abs(averages[1]))
        if averages[1] > 1e-6 * size:
            expected = averages[0] / averages[1]
            assert out["noise_scale"].item() == pytest.approx(expected, rel=1e-6)
        elif averages[1] < -1e-6 * size:
            assert out["noise_scale"] == math.inf
        assert_close(out["cosine"].item(), cosine, rtol=1e-6, atol=1e-9)
        finite = [row.norm().item() for row in matrix if row.isfinite().all()]
        for name, level in (("norm_10", 0.1), ("norm_50", 0.5), ("norm_90", 0.9)):
            assert_close(out[name].item(), np.quantile(finite, level) if finite else math.nan)


def test_many_rows_without_a_gram_give_the_same():
    matrix = random_matrix(0, 100)
    rows = gf.DenseStack(unflat(matrix))
    assert not rows.gram_is_cheap()
    watch = gf.watch(decay=0.0)
    _, _, out = watch.update(rows, watch.init(zeros()), zeros())
    trace, sq_norm, cosine = statistics_of(matrix)
    assert_close(out["cosine"].item(), cosine)
    expected = trace / sq_norm if sq_norm > 0 else math.inf
    assert out["noise_scale"].item() == pytest.approx(expected)
    found = noise_scale(rows, 1).samples
    assert found.item() == pytest.approx(out["noise_scale"].item())


def test_behind_a_filter_it_sees_the_weights_and_removed_rows():
    """Three of five rows agree; one is removed before, and one is not accepted."""
    direction = normal(flat(zeros()).numel())
    matrix = torch.stack([direction, 2 * direction, direction, -direction, direction])
    matrix[4, 0] = torch.nan
    update = gf.chain(
        gf.finite_filter(), gf.agree_filter(0.9), gf.watch(), gf.sgd(0.1), gf.ema_params(0.9)
    )
    params = zeros()
    info = update(params, update.init(params), unflat(matrix))[2]
    assert_close(info["watch/accepted_fraction"].item(), 0.6)
    assert_close(info["watch/effective_rows"].item(), 3.0)
    assert_close(info["watch/norm_50"].item(), direction.norm().item())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("plan", ["loop", "fused"])
def test_rows_of_a_network_by_ordinary_backward_passes(plan):
    model = network()
    rule = gf.chain(gf.mean_rows(), gf.watch(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), rule, plan=plan)
    x = normal(40, 4)
    y = (x[:, 0] > 0).long()
    _, info = step(step.init(model), (x, y))
    losses = F.cross_entropy(model(x), y, reduction="none")
    leaves = list(model.parameters())
    each = [torch.autograd.grad(one, leaves, retain_graph=True) for one in losses]
    rows = [torch.cat([g.flatten() for g in grads]) for grads in each]
    trace, sq_norm, cosine = statistics_of(torch.stack(rows))
    assert sq_norm > 0 and info["watch/noise_scale"].item() == pytest.approx(trace / sq_norm)
    assert info["watch/cosine"].item() == pytest.approx(cosine)
    assert info["watch/loss_90"].item() == pytest.approx(losses.detach().quantile(0.9).item())
    assert info["watch/effective_rows"].item() == pytest.approx(40)


def test_it_measures_in_every_kth_step_only():
    update = gf.chain(gf.mean_rows(), gf.watch(3), gf.sgd(0.1))
    params = zeros()
    state = update.init(params)
    for step in range(7):
        rows = unflat(random_matrix(step, 4))
        params, state, info = update(params, state, rows)
        assert ("watch/cosine" in info) is (step % 3 == 0)


def test_skipped_steps_are_watched():
    update = gf.chain(gf.watch(), gf.mean_rows(), gf.sgd(0.1))
    params = zeros()
    state = update.init(params)
    rows = unflat(random_matrix(1, 4))
    _, after, info = update(params, state, rows, keep=torch.tensor(False))
    assert not info["keep"] and after["watch"]["trace"] > 0


def test_behind_agreement_it_needs_no_further_pass():
    """Its numbers come from the Gram that the filter has asked for."""
    model = network()
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4, plan="fused")
    params, _ = gf.extract(model)
    rows = grads_of(params, (normal(8, 4), torch.arange(8) % 3))
    gf.agree_filter(2.0).update(rows, {}, params)
    rows.release()  # another pass would have to be made

    def no_pass(*args):
        raise AssertionError("the rows are computed again")

    rows.run._ask = no_pass
    watch = gf.watch()
    watch.update(rows, watch.init(params), params)


def test_quantiles_have_names_without_dots():
    names = gf.watch(quantiles=(0.025, 1.0)).publishes
    assert {"norm_2_5", "norm_100", "loss_2_5", "loss_100"} <= names


def test_a_gradient_without_rows_is_refused():
    with pytest.raises(ValueError, match="watch: expected rows in the chain"):
        gf.watch().update(zeros(), gf.watch().init(zeros()), zeros())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gf.watch(0), "every as a whole number >= 1"),
        (lambda: gf.watch(decay=1.0), "decay"),
        (lambda: gf.watch(quantiles=(2.0,)), "quantiles"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
