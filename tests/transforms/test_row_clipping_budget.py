"""`budget_clip` against its formula, solved by bisection instead of sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_consensus import leave_one_out

import gradfilter as gf
from _naive import (
    BAD,
    WIDTH,
    assert_close,
    assert_same,
    flat,
    normal,
    random_matrix,
    run,
    unflat,
    zeros,
)

seeds = st.integers(0, 2**20)
budgets = st.floats(0.01, 0.99)
powers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0])
MIXED = ("plain",) * 6 + ("zero", "tiny", *BAD)


def clip(matrix, budget, power, first=None):
    """The clipped rows and what was published; ``first`` is the mean norm of the first step."""
    link = gf.budget_clip(budget, power=power)
    state = {"first": torch.as_tensor(0.0 if first is None else first, dtype=torch.float64)}
    rows, state, out = link.update(unflat(matrix), state, zeros())
    return flat(rows.stacked(), batch_dims=1), out, state


def expected(matrix, budget, power, first=None):
    """The same rows from the definition."""
    finite = matrix.isfinite().all(1)
    norms = matrix[finite].norm(dim=1)
    mean = norms.mean()
    limit = budget * (mean if first is None else first)
    if not mean > limit:
        return matrix
    shares = leave_one_out(matrix)[finite].clamp(min=1e-3) ** power
    low, high = 0.0, (norms / shares).max().item()
    for _ in range(200):
        level = (low + high) / 2
        enough = torch.minimum(norms, level * shares).mean() >= limit**2 / mean
        low, high = (low, level) if enough else (level, high)
    factors = torch.where(norms > 0, level * shares / norms.clamp(min=1e-300), 1.0).clamp(max=1)
    clipped = matrix.clone()
    clipped[finite] = matrix[finite] * factors[:, None]
    return clipped


@given(seed=seeds, budget=budgets, power=powers)
def test_random_stacks_follow_the_definition(seed, budget, power):
    matrix = random_matrix(seed, 1 + seed % 9, MIXED)
    if not matrix.isfinite().all(1).any():
        return
    clipped, out, _ = clip(matrix, budget, power)
    wanted = expected(matrix, budget, power)
    assert_close(clipped.nan_to_num(), wanted.nan_to_num(), rtol=1e-6, atol=1e-12)
    shorter = (wanted.norm(dim=1) < matrix.norm(dim=1) * (1 - 1e-9)).to(torch.float64).mean()
    assert_close(out["clipped_fraction"], shorter)


@given(seed=seeds, budget=budgets, power=powers)
def test_the_mean_norm_that_is_left_is_the_square_of_the_budget_over_the_mean(seed, budget, power):
    matrix = random_matrix(seed, 7)
    clipped, out, state = clip(matrix, budget, power)
    mean = matrix.norm(dim=1).mean()
    assert_close(clipped.norm(dim=1).mean(), budget**2 * mean)
    assert_close(out["allowed"], budget**2 * mean)
    assert_close(state["first"], mean)


@given(seed=seeds, power=powers, factor=st.floats(1.0, 10.0))
def test_rows_within_the_budget_are_not_touched(seed, power, factor):
    matrix = random_matrix(seed, 6)
    clipped, out, _ = clip(matrix, 0.5, power, 2 * factor * matrix.norm(dim=1).mean())
    assert torch.equal(clipped, matrix)
    assert out["clipped_fraction"] == 0
    assert out["allowed"] == torch.inf


@given(seed=seeds, budget=budgets, power=powers, factor=st.floats(1e-3, 1e3))
def test_the_rule_has_no_scale_of_its_own(seed, budget, power, factor):
    matrix = random_matrix(seed, 6)
    clipped, _, _ = clip(matrix, budget, power)
    scaled, _, _ = clip(factor * matrix, budget, power)
    assert_close(scaled, factor * clipped, rtol=1e-7)


@given(seed=seeds, budget=budgets, power=powers)
def test_the_order_of_the_rows_does_not_matter(seed, budget, power):
    matrix = random_matrix(seed, 8, ("plain", "plain", "zero"))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert_close(clip(matrix[order], budget, power)[0], clip(matrix, budget, power)[0][order])


@given(seed=seeds, power=powers)
def test_the_rule_is_continuous_where_it_sets_in(seed, power):
    matrix = random_matrix(seed, 6)
    mean = matrix.norm(dim=1).mean()
    clipped, _, _ = clip(matrix, 1.0, power, mean * (1 - 1e-9))
    assert_close(clipped.norm(dim=1).mean(), mean, rtol=1e-7)


@given(seed=seeds, budget=budgets)
def test_without_a_power_the_longest_rows_become_equal_and_the_others_stay(seed, budget):
    matrix = random_matrix(seed, 9)
    clipped, out, _ = clip(matrix, budget, 0)
    cut = clipped.norm(dim=1) < matrix.norm(dim=1) * (1 - 1e-12)
    assert cut.any()
    level = clipped[cut].norm(dim=1)
    assert_close(level, level[0].expand_as(level), rtol=1e-9)
    assert_close(clipped[~cut], matrix[~cut])
    assert "cosine" not in out


def test_of_two_groups_that_disagree_the_larger_one_gets_the_budget():
    right, wrong = normal(2, WIDTH)
    matrix = torch.stack([right] * 5 + [-2 * right] * 2 + [right + 0.1 * wrong])
    clipped, out, _ = clip(matrix, 0.5, 2)
    shares = clipped.norm(dim=1) / clipped.norm(dim=1).sum()
    assert shares[5:7].sum() < 1e-4
    assert (out["cosine"][5:7] < 0).all()


def test_the_budget_falls_when_rows_grow_again():
    matrix = random_matrix(1, 8)
    mean = matrix.norm(dim=1).mean()
    left = [clip(k * matrix, 0.5, 2, mean)[0].norm(dim=1).mean() for k in (1, 2, 4)]
    assert_close(torch.stack(left), mean / 4 / torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))


def test_the_first_step_sets_the_scale_and_later_ones_keep_it():
    update = gf.chain(gf.budget_clip(0.5, power=0), gf.mean_rows(), gf.sgd(1.0))
    params = {"w": torch.zeros(2)}
    state = update.init(params)
    rows = torch.tensor([[4.0, 0.0], [4.0, 0.0]])  # budget 2
    params, state, info = update(params, state, {"w": rows})
    assert_close(params["w"], torch.tensor([-1.0, 0.0]))
    assert info["budget_clip/allowed"] == 1
    params, state, info = update(params, state, {"w": rows / 2})
    assert_close(params["w"], torch.tensor([-3.0, 0.0]))
    assert info["budget_clip/allowed"] == torch.inf


def test_a_first_step_that_is_skipped_sets_no_scale():
    update = gf.chain(gf.budget_clip(0.5, power=0), gf.finite_filter(), gf.mean_rows(), gf.sgd(1.0))
    params = {"w": torch.zeros(1)}
    state = update.init(params)
    bad = {"w": torch.full((2, 1), torch.nan)}
    params, state, info = update(params, state, bad)
    assert not info["keep"]
    params, state, info = update(params, state, {"w": torch.tensor([[8.0], [8.0]])})
    assert info["budget_clip/allowed"] == 2
    assert params["w"] == -2


def test_a_row_of_which_nothing_is_left_is_still_one_of_the_mean():
    matrix = torch.cat([random_matrix(2, 5).abs(), -normal(1, WIDTH).abs()])
    update = gf.chain(gf.budget_clip(0.3, power=200.0), gf.mean_rows())
    clipped, _, _ = clip(matrix, 0.3, 200.0)
    assert clipped[-1].norm() < 1e-200
    assert_close(flat(run(update, unflat(matrix))[0]), clipped.mean(0))


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_rows_that_are_all_zero_stay(power):
    matrix = torch.zeros(4, WIDTH, dtype=torch.float64)
    clipped, out, state = clip(matrix, 0.3, power)
    assert torch.equal(clipped, matrix)
    assert state["first"] == 0
    assert out["clipped_fraction"] == 0


def test_rows_that_are_not_finite_stay_and_do_not_count():
    matrix = random_matrix(5, 8, ("plain", "plain", *BAD))
    bad = ~matrix.isfinite().all(1)
    assert 0 < bad.sum() < 6
    clipped, _, _ = clip(matrix, 0.3, 2)
    assert_same(clipped[bad], matrix[bad])
    assert_close(clipped[~bad], clip(matrix[~bad], 0.3, 2)[0])


def test_rows_that_finite_filter_took_out_stay_out():
    matrix = random_matrix(3, 6, ("plain", "plain", "nan"))
    there = matrix.isfinite().all(1)
    assert 1 < there.sum() < 6
    both = [gf.budget_clip(0.4), gf.mean_rows()]
    grads, _ = run(gf.chain(gf.finite_filter(), *both), unflat(matrix))
    assert_close(grads, run(gf.chain(*both), unflat(matrix[there]))[0])


def test_a_schedule_may_drive_the_budget():
    falling = gf.scheduled(gf.budget_clip, budget=gf.schedules.linear(0.8, 10), power=0)
    update = gf.chain(falling, gf.mean_rows(), gf.sgd(1.0))
    params = {"w": torch.zeros(1)}
    state, info = update.init(params), []
    for _ in range(3):
        params, state, out = update(params, state, {"w": torch.ones(2, 1)})
        info.append(out["budget_clip/allowed"])
    assert_close(torch.stack(info), torch.tensor([0.8, 0.72, 0.64]).double() ** 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0.0,), "budget"), ((-1.0,), "budget"), (("a lot",), "budget"), ((0.3, -1.0), "power")],
)
def test_what_makes_no_sense_is_refused(arguments, words):
    names = ("budget", "power")
    with pytest.raises(ValueError, match=rf"budget_clip: expected 0 <=? {words}.*good start"):
        gf.budget_clip(**dict(zip(names, arguments, strict=False)))
