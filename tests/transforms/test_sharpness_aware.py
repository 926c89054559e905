"""`sam_perturb` against SAM, ASAM and GSAM's adaptive form, written out on flat vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
from _naive import assert_close, assert_same, flat, run, unflat
from _regression import (
    SHAPES,
    M,
    ascent,
    loss,
    make_batch,
    make_params,
    problem,
    row,
    rows_at,
)

FORMS = [(None, 0.05, 0.01), ("asam", 0.5, 0.01), ("asam", 0.5, 0.0), ("gsam", 0.2, 0.01)]
every_form = pytest.mark.parametrize(("adaptive", "rho", "eta"), FORMS)


@every_form
def test_after_the_mean(adaptive, rho, eta):
    params, batch, rows, w, losses, grads = problem()
    h, out = run(
        gf.chain(gf.mean_rows(), gf.sam_perturb(rho, adaptive=adaptive, eta=eta)), rows, params
    )
    near = w + ascent(w, grads.mean(0), rho, adaptive, eta)
    near_losses, near_grads = rows_at(near, batch)
    assert_close(flat(h), near_grads.mean(0))
    assert_close(flat(out["clean_grads"]), grads.mean(0))
    assert_close(out["sam_perturb/surrogate_gap"], (near_losses - losses).mean(), rtol=1e-8)


@every_form
def test_after_a_filter_the_second_gradient_has_the_same_weights(adaptive, rho, eta):
    params, batch, rows, w, losses, grads = problem(2)
    chain = gf.chain(gf.agree_filter(1.0), gf.sam_perturb(rho, adaptive=adaptive, eta=eta))
    h, out = run(chain, rows, params)
    weights = out["weights"]
    assert 1 < out["agree_filter/accepted"].sum() < M
    near_losses, near_grads = rows_at(w + ascent(w, weights @ grads, rho, adaptive, eta), batch)
    assert_close(flat(h), weights @ near_grads)
    gap = weights @ (near_losses - losses)
    assert_close(out["sam_perturb/surrogate_gap"], gap, rtol=1e-8)


@every_form
def test_before_a_filter_the_rows_are_those_at_the_perturbed_point(adaptive, rho, eta):
    params, batch, rows, w, losses, grads = problem()
    near = w + ascent(w, grads.mean(0), rho, adaptive, eta)
    near_losses, near_grads = rows_at(near, batch)
    link = gf.sam_perturb(rho, adaptive=adaptive, eta=eta)
    again, out = run(link, rows, params)
    assert_close(flat(again.stacked(), batch_dims=1), near_grads)
    assert_close(again.losses, near_losses)
    assert_close(out["surrogate_gap"], (near_losses - losses).mean(), rtol=1e-8)
    filtered, _ = run(gf.chain(link, gf.agree_filter(1.0)), rows, params)
    assert_close(filtered, run(gf.agree_filter(1.0), unflat(near_grads, SHAPES), params)[0])


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 3)])
def test_the_ascent_before_a_filter_is_along_the_mean_of_the_finite_rows(bad):
    params, batch, rows, w, losses, grads = problem(3, bad)
    good = [m for m in range(M) if m not in bad]
    near_losses, near_grads = rows_at(w + ascent(w, grads[good].mean(0), 0.1), batch)
    h, out = run(gf.chain(gf.sam_perturb(0.1), gf.agree_filter(2.0)), rows, params)
    assert out["keep"].item() == (len(good) > 1)
    assert_close(flat(h), near_grads[good].mean(0))
    gap = (near_losses - losses)[good].mean()
    assert_close(out["sam_perturb/surrogate_gap"], gap, rtol=1e-8)
    taken_out, _ = run(
        gf.chain(gf.finite_filter(), gf.sam_perturb(0.1), gf.mean_rows()), rows, params
    )
    assert_close(taken_out, h)


def test_without_a_finite_row_the_step_is_skipped_with_finite_numbers():
    params, _, rows, *_ = problem(0, bad=range(M))
    for chain in (
        gf.chain(gf.sam_perturb(0.1), gf.agree_filter(2.0)),
        gf.chain(gf.agree_filter(2.0), gf.sam_perturb(0.1)),
    ):
        h, out = run(chain, rows, params)
        assert not out["keep"]
        assert_close(flat(h), torch.zeros(flat(params).shape, dtype=torch.float64))
        assert out["sam_perturb/surrogate_gap"] == 0


@every_form
def test_per_microbatch_is_a_loop_over_the_rows(adaptive, rho, eta):
    params, batch, rows, w, losses, grads = problem(4)
    link = gf.sam_perturb(rho, adaptive=adaptive, eta=eta, per_microbatch=True)
    again, out = run(link, rows, params)
    looped = [row(w + ascent(w, g, rho, adaptive, eta), batch, m) for m, g in enumerate(grads)]
    expected = torch.stack([g for _, g in looped])
    assert_close(flat(again.stacked(), batch_dims=1), expected)
    gap = sum(value - before.item() for (value, _), before in zip(looped, losses, strict=True)) / M
    assert_close(out["surrogate_gap"].item(), gap, rtol=1e-8)
    for reducer in (gf.mean_rows(), gf.agree_filter(1.0)):
        h, _ = run(gf.chain(link, reducer), rows, params)
        assert_close(h, run(reducer, unflat(expected, SHAPES), params)[0])


def test_a_bad_row_does_not_reach_the_others_per_microbatch():
    params, batch, rows, w, _, grads = problem(5, bad=(1,))
    chain = gf.chain(gf.sam_perturb(0.1, per_microbatch=True), gf.agree_filter(2.0))
    good = [0, 2, 3]
    expected = torch.stack([row(w + ascent(w, grads[m], 0.1), batch, m)[1] for m in good])
    assert_close(flat(run(chain, rows, params)[0]), expected.mean(0))


@every_form
@pytest.mark.parametrize("per_microbatch", [False, True])
def test_a_zero_gradient_stays_finite(adaptive, rho, eta, per_microbatch):
    params = {"w": torch.zeros(3, dtype=torch.float64), "v": torch.ones((), dtype=torch.float64)}
    grads_of = gf.microbatch_grads(lambda p, x: (x * p["w"] ** 2).sum() * p["v"], 2)
    rows = grads_of(params, torch.arange(12.0, dtype=torch.float64).reshape(4, 3))
    link = gf.sam_perturb(rho, adaptive=adaptive, eta=eta, per_microbatch=per_microbatch)
    h, out = run(gf.chain(link, gf.mean_rows()), rows, params)
    assert_same(h, {name: torch.zeros_like(p) for name, p in params.items()})
    assert out["sam_perturb/surrogate_gap"] == 0


@every_form
@given(seed=st.integers(0, 2**20))
def test_the_perturbed_point_is_where_the_formula_says(adaptive, rho, eta, seed):
    params, g = make_params(seed), make_params(seed + 1)
    g["unused"] = torch.zeros_like(g["unused"])
    seen = []

    def grad_fn(near):
        seen.append(near)
        return g

    link = gf.sam_perturb(rho, adaptive=adaptive, eta=eta)
    h, _ = run(link, g, params, grad_fn=grad_fn)
    (near,) = seen
    e = flat(near) - flat(params)
    assert_close(e, ascent(flat(params), flat(g), rho, adaptive, eta), atol=1e-14)
    assert_same(near["unused"], params["unused"])
    assert_same(h, g)
    if adaptive is None:
        assert_close(e.norm().item(), rho)


def test_radius_zero_gives_the_gradients_that_came_in():
    params, _, rows, _, _, grads = problem()
    again, out = run(gf.sam_perturb(0.0), rows, params)
    assert_close(flat(again.stacked(), batch_dims=1), grads)
    assert out["surrogate_gap"] == 0


def test_clipping_factors_are_frozen_at_the_clean_point():
    params, batch, rows, w, _, grads = problem()
    limit = grads.norm(dim=1).median().item()
    factors = (limit / grads.norm(dim=1)).clamp(max=1)[:, None]
    assert 0 < (factors < 1).sum() < M
    near = w + ascent(w, (factors * grads).mean(0), 0.3)
    expected = factors * rows_at(near, batch)[1]
    clip, sam, mean = gf.clip_per_row(limit), gf.sam_perturb(0.3), gf.mean_rows()
    assert_close(flat(run(gf.chain(clip, mean, sam), rows, params)[0]), expected.mean(0))
    again, _ = run(gf.chain(clip, sam), rows, params)
    assert_close(flat(again.stacked(), batch_dims=1), expected)


def test_per_microbatch_keeps_clipping_factors_too():
    params, batch, rows, w, _, grads = problem()
    limit = grads.norm(dim=1).median().item()
    chain = gf.chain(gf.clip_per_row(limit), gf.sam_perturb(0.3, per_microbatch=True))
    again, _ = run(chain, rows, params)
    for m, g in enumerate(grads):
        factor = min(1, limit / g.norm().item())
        expected = factor * row(w + ascent(w, g, 0.3), batch, m)[1]
        assert_close(flat(again.stacked(), batch_dims=1)[m], expected)


def test_training_applies_the_perturbed_gradient_at_the_clean_parameters():
    params, batch, rows, w, _, grads = problem()
    update = gf.chain(gf.mean_rows(), gf.sam_perturb(0.2), gf.sgd(0.1))
    moved, _, _ = update(params, update.init(params), rows)
    h = rows_at(w + ascent(w, grads.mean(0), 0.2), batch)[1].mean(0)
    assert_close(flat(moved), w - 0.1 * h)


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
def test_both_plans_answer_the_second_pass(plan):
    params, batch = make_params(6), make_batch(7)
    rows = gf.microbatch_grads(loss, M, plan=plan)(params, batch)
    w = flat(params)
    near = w + ascent(w, rows_at(w, batch)[1].mean(0), 0.3)
    again, _ = run(gf.sam_perturb(0.3), rows, params)
    assert_close(flat(again.stacked(), batch_dims=1), rows_at(near, batch)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "0 <= rho, found rho=-0.1"),
        ({"rho": float("nan")}, "found rho=nan"),
        ({"rho": 0.1, "eta": -1}, "0 <= eta, found eta=-1"),
        ({"rho": 0.1, "adaptive": "sam"}, "found 'sam'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.sam_perturb(**arguments)
