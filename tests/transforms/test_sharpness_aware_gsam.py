"""`gsam_decompose`: its formula, its identities, and its place in a chain."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
from _naive import assert_close, assert_same, flat, normal_tree, run, zeros
from _regression import M, ascent, problem, rows_at

seeds = st.integers(0, 2**20)
alphas = st.floats(0, 2)


def decompose(g, h, alpha):
    """h − α g_⊥, with g_⊥ the part of g at right angles to h, on flat vectors."""
    unit = h / h.norm()
    return h - alpha * (g - (g @ unit) * unit)


def pair(seed):
    return normal_tree(seed), normal_tree(seed + 1)


def apply(g, h, alpha):
    return run(gf.gsam_decompose(alpha), h, clean_grads=g)


@given(seed=seeds, alpha=alphas)
def test_takes_alpha_times_the_orthogonal_part_of_the_clean_gradient_away(seed, alpha):
    g, h = pair(seed)
    d, out = apply(g, h, alpha)
    assert_close(flat(d), decompose(flat(g), flat(h), alpha), atol=1e-10)
    cosine = flat(g) @ flat(h) / (flat(g).norm() * flat(h).norm())
    assert_close(out["cosine"], cosine)


@given(seed=seeds, alpha=alphas)
def test_the_part_along_the_perturbed_gradient_is_untouched(seed, alpha):
    g, h = pair(seed)
    d, _ = apply(g, h, alpha)
    assert_close(flat(d) @ flat(h), flat(h) @ flat(h))
    # What is added lowers the gap: it goes against the clean gradient.
    assert (flat(d) - flat(h)) @ flat(g) <= 1e-10


@given(seed=seeds)
def test_alpha_zero_is_sam(seed):
    g, h = pair(seed)
    assert_same(apply(g, h, 0.0)[0], h)


@given(seed=seeds, alpha=alphas, factor=st.floats(0.1, 10))
def test_parallel_gradients_have_nothing_to_take_away(seed, alpha, factor):
    h = normal_tree(seed)
    g = {name: factor * leaf for name, leaf in h.items()}
    assert_close(apply(g, h, alpha)[0], h, atol=1e-10)


def test_where_the_perturbed_gradient_is_zero_nothing_goes_uphill():
    g = normal_tree(0)
    bad = {name: torch.full_like(leaf, torch.nan) for name, leaf in g.items()}
    for clean in (g, zeros(), bad):
        d, out = apply(clean, zeros(), 0.4)
        assert_same(d, zeros())
        assert clean is bad or out["cosine"] == 0


@pytest.mark.parametrize("reducer", [gf.mean_rows, lambda: gf.agree_filter(1.0)])
def test_in_a_chain_after_the_reducer(reducer):
    params, batch, rows, w, _, grads = problem(2)
    chain = gf.chain(reducer(), gf.sam_perturb(0.3), gf.gsam_decompose(0.4))
    d, out = run(chain, rows, params)
    g = out["weights"] @ grads
    h = out["weights"] @ rows_at(w + ascent(w, g, 0.3), batch)[1]
    assert_close(flat(d), decompose(g, h, 0.4))


@pytest.mark.parametrize("reducer", [gf.mean_rows, lambda: gf.agree_filter(1.0)])
def test_in_a_chain_before_the_reducer_the_clean_rows_get_its_weights(reducer):
    params, batch, rows, w, _, grads = problem(2)
    chain = gf.chain(gf.sam_perturb(0.3), reducer(), gf.gsam_decompose(0.4))
    d, out = run(chain, rows, params)
    h = out["weights"] @ rows_at(w + ascent(w, grads.mean(0), 0.3), batch)[1]
    assert_close(flat(d), decompose(out["weights"] @ grads, h, 0.4))


def test_clean_rows_are_taken_as_clipped():
    params, batch, rows, w, _, grads = problem()
    limit = grads.norm(dim=1).median().item()
    factors = (limit / grads.norm(dim=1)).clamp(max=1)[:, None]
    chain = gf.chain(
        gf.clip_per_row(limit), gf.sam_perturb(0.3), gf.mean_rows(), gf.gsam_decompose(0.4)
    )
    g = (factors * grads).mean(0)
    h = (factors * rows_at(w + ascent(w, g, 0.3), batch)[1]).mean(0)
    assert 0 < (factors < 1).sum() < M
    assert_close(flat(run(chain, rows, params)[0]), decompose(g, h, 0.4))


def test_a_bad_clean_row_of_weight_zero_does_no_harm():
    params, batch, rows, w, _, grads = problem(3, bad=(0,))
    chain = gf.chain(gf.sam_perturb(0.3), gf.agree_filter(2.0), gf.gsam_decompose(0.4))
    g = grads[1:].mean(0)
    h = rows_at(w + ascent(w, g, 0.3), batch)[1][1:].mean(0)
    assert_close(flat(run(chain, rows, params)[0]), decompose(g, h, 0.4))


def test_what_it_needs_is_said():
    params, _, rows, *_ = problem()
    with pytest.raises(ValueError, match=r"needs 'clean_grads'.*sam_perturb"):
        gf.chain(gf.mean_rows(), gf.gsam_decompose(0.4))
    with pytest.raises(ValueError, match=r"found none\. Put sam_perturb"):
        run(gf.gsam_decompose(0.4), params, params)
    with pytest.raises(ValueError, match="weights that combine the clean rows"):
        run(gf.gsam_decompose(0.4), params, params, clean_grads=rows)
    with pytest.raises(ValueError, match="0 <= alpha, found alpha=-1"):
        gf.gsam_decompose(-1)


def test_zero_clean_gradient_gives_the_perturbed_one():
    h = normal_tree(4)
    assert_close(apply(zeros(), h, torch.tensor(0.4, dtype=torch.float64))[0], h)
