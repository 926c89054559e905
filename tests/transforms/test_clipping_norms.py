"""`clip_per_row` and `clip_by_global_norm` against their formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
from _naive import (
    BAD,
    assert_close,
    assert_same,
    flat,
    normal_tree,
    random_matrix,
    run,
    unflat,
    zeros,
)

limits = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**20)


@given(seed=seeds, limit=limits)
def test_every_row_is_scaled_to_the_limit_or_left_alone(seed, limit):
    matrix = random_matrix(seed, 7, ("plain", "plain", "plain", "zero", "tiny", *BAD))
    rows, out = run(gf.clip_per_row(limit), unflat(matrix))
    clipped = flat(rows.stacked(), batch_dims=1)
    shorter = 0
    for before, after in zip(matrix, clipped, strict=True):
        if before.isfinite().all() and before.norm() > limit:
            assert_close(after, before * (limit / before.norm()))
            shorter += 1
        else:
            assert_same(after, before)
    assert_close(out["clipped_fraction"].item(), shorter / 7)
    finite = matrix.isfinite().all(1)
    assert_close(out["norm"][finite], matrix[finite].norm(dim=1))
    assert not out["norm"][~finite].isfinite().any()


@given(seed=seeds, limit=limits)
def test_the_clipped_stack_answers_all_four_questions_as_clipped(seed, limit):
    matrix, weights = random_matrix(seed, 5, ("plain", "zero")), normal_tree(seed)
    rows, _ = run(gf.clip_per_row(limit), unflat(matrix))
    clipped = matrix * (limit / matrix.norm(dim=1, keepdim=True)).clamp(max=1)
    assert_close(rows.sq_norms(), clipped.square().sum(1))
    assert_close(rows.gram(), clipped @ clipped.T)
    assert_close(rows.dot(weights), clipped @ flat(weights))
    share = torch.linspace(-1, 2, 5, dtype=torch.float64)
    assert_close(flat(rows.combine(share)), share @ clipped, atol=1e-9)


def test_rows_that_finite_filter_took_out_stay_out():
    matrix = random_matrix(3, 6, ("plain", "plain", "nan"))
    there = matrix.isfinite().all(1)
    assert 1 < there.sum() < 6
    chain = gf.chain(gf.finite_filter(), gf.clip_per_row(0.5), gf.mean_rows())
    grads, _ = run(chain, unflat(matrix))
    rows, _ = run(gf.clip_per_row(0.5), unflat(matrix[there]))
    assert_close(grads, run(gf.mean_rows(), rows)[0])


def test_the_norm_of_a_row_is_over_all_leaves_together():
    rows = {"a": torch.tensor([[3.0], [3.0]]), "b": torch.tensor([4.0, 0.0])}
    clipped, out = run(gf.clip_per_row(2.5), rows, {"a": torch.zeros(1), "b": torch.zeros(())})
    assert out["norm"].tolist() == [5, 3]
    assert_close(clipped.stacked()["a"], torch.tensor([[1.5], [2.5]]), rtol=1e-6)
    assert_close(clipped.stacked()["b"], torch.tensor([2.0, 0.0]), rtol=1e-6)


@given(seed=seeds, limit=limits)
def test_the_global_norm_is_scaled_to_the_limit_or_left_alone(seed, limit):
    grads = normal_tree(seed)
    norm = flat(grads).norm()
    clipped, out = run(gf.clip_by_global_norm(limit), grads)
    assert_close(out["norm"], norm)
    assert out["clipped_fraction"] == (norm > limit)
    if norm > limit:
        assert_close(flat(clipped), flat(grads) * (limit / norm))
    else:
        assert_same(clipped, grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_keeps_every_entry(bad):
    grads = normal_tree(1)
    grads["fc.bias"][2] = bad
    clipped, out = run(gf.clip_by_global_norm(1e-3), grads)
    assert_same(clipped, grads)
    assert not out["norm"].isfinite()


def test_a_zero_gradient_stays_zero():
    clipped, out = run(gf.clip_by_global_norm(1.0), zeros())
    assert_same(clipped, zeros())
    assert out["norm"] == 0


@pytest.mark.parametrize("factory", [gf.clip_per_row, gf.clip_by_global_norm])
@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), True])
def test_impossible_limits_are_refused(factory, limit):
    with pytest.raises(ValueError, match=f"{factory.__name__}: expected 0 < max_norm, found"):
        factory(limit)
