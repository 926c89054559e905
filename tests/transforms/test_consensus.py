"""`consensus_filter` against its definition, with and without the (M, M) matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
from _naive import (
    BAD,
    WIDTH,
    assert_close,
    flat,
    normal,
    random_matrix,
    run,
    unflat,
    zeros,
)
from gradfilter.grads._stack import GRAM_UP_TO
from gradfilter.transforms._consensus import (
    cosines_from_gram,
    cosines_from_products,
)

INF = float("inf")
EPS = torch.finfo(torch.float64).eps
every_route = pytest.mark.parametrize("cosines", [cosines_from_gram, cosines_from_products])
every_rule = pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
MIXED = ("plain",) * 5 + ("zero", *BAD)


def leave_one_out(rows):
    """s_i = cos(u_i, Σ_{j≠i} u_j) on flat rows (M, P), NaN for a row that is not finite."""
    cosines = []
    for i, g in enumerate(rows):
        others = torch.zeros_like(g)
        for j, h in enumerate(rows):
            if j != i and h.isfinite().all() and h.norm() > 0:
                others = others + h / h.norm()
        if not g.isfinite().all():
            cosines.append(torch.nan)
        elif g.norm() == 0 or others.norm() < 1e-7:
            cosines.append(0.0)
        else:
            cosines.append((g @ others / (g.norm() * others.norm())).item())
    return torch.tensor(cosines, dtype=rows.dtype)


def weigh(cosines, threshold, soft):
    """The weights of cosines (M,), one after the other."""
    raw = []
    for s in cosines.tolist():
        if s != s:
            raw.append(0.0)
        elif soft and threshold < 2:
            raw.append(max(0.0, s - (1 - threshold)))
        else:
            raw.append(float(1 - s <= threshold or threshold >= 2))
    total = sum(raw)
    return torch.tensor([r / total if total else 0.0 for r in raw], dtype=cosines.dtype)


def assert_by_definition(matrix, threshold, soft, min_accepted=2):
    link = gf.consensus_filter(threshold, soft=soft, min_accepted=min_accepted)
    grads, out = run(link, unflat(matrix))
    cosines = leave_one_out(matrix)
    weights = weigh(cosines, threshold, soft)
    assert_close(out["cosine"], cosines, atol=1e-9)
    assert_close(out["weights"], weights, atol=1e-8)
    assert torch.equal(out["accepted"], weights > 0)
    assert out["keep"].item() == ((weights > 0).sum().item() >= min_accepted)
    expected = (weights[:, None] * matrix.nan_to_num(0, 0, 0)).sum(0)
    assert_close(flat(grads), expected, rtol=1e-7, atol=1e-7 * matrix.nan_to_num(0, 0, 0).norm())


@every_rule
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, 1.0, 1.4, 2.0, INF])
def test_random_stacks_follow_the_definition(soft, threshold):
    for seed in range(60):
        assert_by_definition(random_matrix(seed, 1 + seed % 9, MIXED), threshold, soft)


@every_rule
@pytest.mark.parametrize("rows", [GRAM_UP_TO, GRAM_UP_TO + 1, 2 * GRAM_UP_TO])
def test_both_sides_of_the_change_of_route_follow_the_definition(soft, rows):
    assert_by_definition(random_matrix(rows, rows, MIXED), 1.0, soft)
    assert_by_definition(random_matrix(rows, rows, MIXED), 0.7, soft)


def test_the_route_without_the_matrix_asks_for_no_gram():
    class Stingy(gf.DenseStack):
        def gram(self):
            raise AssertionError("a Gram of many rows was made")

    matrix = random_matrix(0, GRAM_UP_TO + 1)
    grads, _ = run(gf.consensus_filter(), Stingy(unflat(matrix)))
    assert_close(flat(grads), weigh(leave_one_out(matrix), 1.0, True) @ matrix, rtol=1e-7)


@every_route
def test_each_route_gives_the_leave_one_out_cosines(cosines):
    for seed in range(100):
        matrix = random_matrix(seed, 1 + seed % 12, MIXED)
        cosine, usable = cosines(gf.DenseStack(unflat(matrix)), EPS)
        assert torch.equal(usable, matrix.isfinite().all(1))
        assert_close(cosine[usable], leave_one_out(matrix)[usable], atol=1e-9)


@every_route
def test_rows_that_cancel_leave_the_others_nothing_to_agree_with(cosines):
    for seed in range(30):
        a, b, c = normal(3, WIDTH, seed=seed)
        pair = torch.stack([a, -7 * a, b])  # b's others sum to 0; a's are −a + b
        cosine, _ = cosines(gf.DenseStack(unflat(pair)), EPS)
        assert_close(cosine, leave_one_out(pair), atol=1e-9)
        assert cosine[2] == 0
        e, f = torch.linalg.qr(torch.stack([a, b]).T)[0].T
        star = torch.stack([e, -e / 2 + 0.75**0.5 * f, -e / 2 - 0.75**0.5 * f, c])
        assert cosines(gf.DenseStack(unflat(star)), EPS)[0][3] == 0


@every_route
def test_single_and_zero_rows_have_cosine_zero(cosines):
    for matrix in (random_matrix(0, 1), random_matrix(1, 4, ("zero",))):
        cosine, usable = cosines(gf.DenseStack(unflat(matrix)), EPS)
        assert usable.all()
        assert_close(cosine, torch.zeros_like(cosine))


@every_rule
def test_no_finite_row_is_a_skip_with_finite_zeros(soft):
    for rows in (3, GRAM_UP_TO + 1):
        grads, out = run(gf.consensus_filter(INF, soft=soft), unflat(random_matrix(2, rows, BAD)))
        assert not out["keep"]
        assert not out["weights"].any()
        assert_close(grads, zeros())


@pytest.mark.parametrize("rows", [4, GRAM_UP_TO + 2])
def test_a_zero_row_passes_the_hard_rule_from_one_on(rows):
    matrix = random_matrix(3, rows)
    matrix[1] = 0
    for threshold, passes in ((0.999, False), (1.0, True)):
        link = gf.consensus_filter(threshold, soft=False)
        assert run(link, unflat(matrix))[1]["accepted"][1].item() is passes


@pytest.mark.parametrize("threshold", [2.0, INF])
@pytest.mark.parametrize("rows", [2, GRAM_UP_TO + 2])
@pytest.mark.parametrize("soft", [True, False])
def test_from_two_on_every_finite_row_is_accepted(threshold, rows, soft):
    for seed in range(10):
        row = normal(301, seed=seed).float()
        signs = torch.ones(rows, 1)
        signs[-1] = -1
        out = run(gf.consensus_filter(threshold, soft=soft), {"w": signs * row}, {"w": row})[1]
        assert out["accepted"].all()
        assert_close(out["weights"], torch.full_like(out["weights"], 1 / rows))


@every_rule
@given(seed=st.integers(0, 2**20), rows=st.sampled_from([2, 5, GRAM_UP_TO + 1]))
def test_the_order_of_the_rows_does_not_matter(soft, seed, rows):
    matrix = random_matrix(seed, rows, MIXED)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    link = gf.consensus_filter(0.95, soft=soft)
    grads, out = run(link, unflat(matrix))
    permuted, permuted_out = run(link, unflat(matrix[order]))
    assert_close(permuted_out["weights"], out["weights"][order], atol=1e-9)
    assert_close(permuted_out["cosine"], out["cosine"][order], atol=1e-9)
    assert_close(permuted, grads, atol=1e-9 * matrix.nan_to_num(0, 0, 0).norm())


@every_rule
@given(seed=st.integers(0, 2**20), rows=st.sampled_from([3, GRAM_UP_TO + 1]))
def test_weights_do_not_depend_on_the_lengths_of_the_rows(soft, seed, rows):
    matrix = random_matrix(seed, rows)
    lengths = 10 ** normal(rows, 1, seed=seed)
    link = gf.consensus_filter(0.9, soft=soft)
    out, scaled = (run(link, unflat(m))[1] for m in (matrix, lengths * matrix))
    assert_close(scaled["cosine"], out["cosine"], atol=1e-9)
    assert_close(scaled["weights"], out["weights"], atol=1e-8)


@every_rule
@pytest.mark.parametrize("rows", [6, GRAM_UP_TO + 4])
def test_rows_that_finite_filter_took_out_are_absent(soft, rows):
    matrix = random_matrix(7, rows, ("plain", "plain", "nan", "inf"))
    there = matrix.isfinite().all(1)
    assert 1 < there.sum() < rows
    link = gf.consensus_filter(1.0, soft=soft)
    filtered, _ = run(gf.finite_filter(), gf.DenseStack(unflat(matrix)))
    grads, out = run(link, filtered)
    alone, out_alone = run(link, unflat(matrix[there]))
    assert_close(grads, alone, atol=1e-9)
    assert_close(out["weights"][there], out_alone["weights"], atol=1e-9)
    assert not out["accepted"][~there].any()
    assert out["cosine"][~there].isnan().all()


@every_rule
@pytest.mark.parametrize("rows", [6, GRAM_UP_TO + 4])
def test_accepted_rows_are_combined_as_clip_per_row_left_them(soft, rows):
    matrix = random_matrix(8, rows)
    shrink = (2 / matrix.norm(dim=1, keepdim=True)).clamp(max=1)
    assert 0 < (shrink < 1).sum() < rows
    clipped, _ = run(gf.clip_per_row(2.0), unflat(matrix))
    grads, out = run(gf.consensus_filter(1.0, soft=soft), clipped)
    weights = weigh(leave_one_out(matrix), 1.0, soft)
    assert_close(out["weights"], weights, atol=1e-9)
    assert_close(flat(grads), weights @ (shrink * matrix), rtol=1e-7)


def test_fewer_than_min_accepted_rows_are_a_skip():
    matrix = random_matrix(9, 6, ("plain", "plain", "nan"))
    count = run(gf.consensus_filter(), unflat(matrix))[1]["accepted"].sum().item()
    assert 1 < count < 6
    for least in range(1, 8):
        out = run(gf.consensus_filter(min_accepted=least), unflat(matrix))[1]
        assert out["keep"].item() is (count >= least)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, r"0 <= threshold <= 2, found threshold=-0.1.*cosine distance"),
        ({"threshold": float("nan")}, "found threshold=nan"),
        ({"min_accepted": 0}, "1 <= min_accepted"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.consensus_filter(**arguments)
