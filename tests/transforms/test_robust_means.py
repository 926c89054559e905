"""Robust means of rows, against loops over coordinates and rows."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _allocations import Peak
from _naive import (
    BAD,
    WIDTH,
    assert_close,
    assert_same,
    flat,
    normal_tree,
    random_matrix,
    run,
    unflat,
    zeros,
)
from gradfilter.transforms._robust_means import comparators, sorted_columns

seeds = st.integers(0, 2**20)
EMPTY = (math.nan, 0.0)  # the loss and gradient of a row without labels
REDUCERS = {
    "trimmed_mean": lambda: gf.trimmed_mean(1),
    "coordinate_median": gf.coordinate_median,
}
every_reducer = pytest.mark.parametrize("name", REDUCERS)


def filtered(matrix):
    """The stack that finite_filter leaves."""
    return run(gf.finite_filter(), gf.DenseStack(unflat(matrix)))[0]


# --- Means of the middle values of every coordinate ---


def middle_mean(matrix, k):
    """Sort every coordinate by itself, NaN as Inf, and average what is left."""
    found = []
    for column in matrix.T.tolist():
        values = sorted(math.inf if math.isnan(value) else value for value in column)
        drop = min(k, (len(values) - 1) // 2)
        values = values[drop : len(values) - drop]
        found.append(sum(values) / len(values))
    return torch.tensor(found, dtype=matrix.dtype)


@given(seed=seeds, rows=st.integers(1, 9), k=st.integers(0, 5))
def test_trimmed_mean_sorts_every_coordinate(seed, rows, k):
    matrix = random_matrix(seed, rows, ("plain", "plain", "zero"))
    grads, out = run(gf.trimmed_mean(k), unflat(matrix))
    assert_close(flat(grads), middle_mean(matrix, k))
    assert out == {}


@given(seed=seeds, rows=st.integers(1, 9))
def test_coordinate_median_is_the_median_of_every_coordinate(seed, rows):
    matrix = random_matrix(seed, rows, ("plain", "plain", "zero"))
    expected = torch.tensor([statistics.median(c) for c in matrix.T.tolist()]).double()
    median = flat(run(gf.coordinate_median(), unflat(matrix))[0])
    assert_close(median, expected, rtol=1e-6)
    assert_close(median, flat(run(gf.trimmed_mean(rows), unflat(matrix))[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_outliers_up_to_the_number_that_is_dropped(value):
    for rows in range(3, 10):
        for k in range((rows + 1) // 2):
            matrix = random_matrix(rows + k, rows)
            clean = matrix.clone()
            for bad in range(k + 2):
                grads = flat(run(gf.trimmed_mean(k), unflat(matrix))[0])
                assert_close(grads, middle_mean(matrix, k))
                assert grads[2].isfinite() == (bad <= k)
                others = [c for c in range(WIDTH) if c != 2]
                assert_close(grads[others], middle_mean(clean, k)[others])
                matrix[bad % rows, 2] = value


@every_reducer
@pytest.mark.parametrize("kind", BAD)
def test_finite_filter_before_removes_the_whole_row(name, kind):
    matrix = torch.cat([random_matrix(1, 4), random_matrix(2, 1, (kind,)), random_matrix(3, 2)])
    finite = matrix[[0, 1, 2, 3, 5, 6]]
    found = run(REDUCERS[name](), filtered(matrix))[0]
    assert_close(found, run(REDUCERS[name](), unflat(finite))[0])


@every_reducer
def test_rows_that_take_no_part_are_left_out(name):
    matrix = random_matrix(4, 6)
    rows = unflat(matrix)
    for leaf in rows.values():
        leaf[1] = 0
    losses = torch.ones(6, dtype=torch.float64)
    losses[1] = math.nan
    expected = run(REDUCERS[name](), unflat(matrix[[0, 2, 4, 5]]))[0]
    removed = gf.DenseStack(rows, losses).scaled(torch.tensor([1.0, 1, 1, 0, 1, 1]))
    assert_close(run(REDUCERS[name](), removed)[0], expected)
    # No row at all gives zeros, as the mean does.
    nothing = gf.DenseStack(rows).scaled(torch.zeros(6))
    assert_same(run(REDUCERS[name](), nothing)[0], zeros())


@every_reducer
def test_one_row_is_the_result(name):
    matrix = random_matrix(5, 1)
    assert_close(flat(run(REDUCERS[name](), unflat(matrix))[0]), matrix[0])


@every_reducer
def test_the_order_of_the_rows_does_not_matter(name):
    matrix = random_matrix(6, 7)
    found = run(REDUCERS[name](), unflat(matrix[[3, 0, 6, 2, 5, 1, 4]]))[0]
    assert_close(found, run(REDUCERS[name](), unflat(matrix))[0])


def test_up_to_k_rows_cannot_leave_the_range_of_the_others():
    matrix = random_matrix(7, 7)
    matrix[:2] = torch.tensor([1e30, -1e30])[:, None]
    found = flat(run(gf.trimmed_mean(2), unflat(matrix))[0])
    assert (found >= matrix[2:].amin(0)).all() and (found <= matrix[2:].amax(0)).all()


@pytest.mark.parametrize("count", [*range(1, 34), 40, 64])
def test_a_sorting_network_sorts(count):
    values = torch.randn(count, 50).round(decimals=1)
    values[:, :3] = math.inf
    assert torch.equal(sorted_columns(values), values.sort(0).values)
    pairs = comparators(count)
    assert all(low < high < count for low, high in pairs)
    for bits in range(2 ** min(count, 10)):  # of zeros and ones: then it sorts everything
        row = [bits >> place & 1 for place in range(min(count, 10))] + [0] * (count - 10)
        for low, high in pairs:
            row[low], row[high] = sorted((row[low], row[high]))
        assert row == sorted(row)


@pytest.mark.parametrize("rows", [8, 40])
def test_the_rows_of_all_leaves_are_never_sorted_together(rows):
    big = torch.randn(rows, 2**19 // rows * 8)
    stack = gf.DenseStack({"a": big, "b": torch.randn(rows, 100)})
    params = {"a": torch.zeros(big.shape[1]), "b": torch.zeros(100)}
    with Peak() as peak:
        run(gf.trimmed_mean(1), stack, params)
    assert peak.peak < big.nbytes / 2 + 3 * params["a"].nbytes


def small_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, 3))
    return model.double(), (torch.randn(24, 6).double(), torch.randint(3, (24,)))


@every_reducer
@pytest.mark.parametrize("budget", [None, 0])
def test_rows_of_any_plan_give_what_ordinary_gradients_give(name, budget):
    model, (x, y) = small_network()
    rows = []
    for xs, ys in zip(x.chunk(6), y.chunk(6), strict=True):
        model.zero_grad()
        F.cross_entropy(model(xs), ys).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters()})
    dense = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
    params, _ = gf.extract(model)
    expected = run(REDUCERS[name](), dense, params)[0]
    loss = gf.model_loss(model, F.cross_entropy)
    for plan in ("fused", "vmap", "loop"):
        options = {"memory_budget": budget} if plan == "fused" and budget is not None else {}
        computed = gf.microbatch_grads(loss, 6, plan=plan, **options)(params, (x, y))
        assert_close(run(REDUCERS[name](), computed, params)[0], expected, rtol=1e-8)
        scaled = computed.scaled(torch.tensor([1.0, 0, 2, 1, -1, 1]))
        again = gf.DenseStack(dense).scaled(torch.tensor([1.0, 0, 2, 1, -1, 1]))
        assert_close(
            run(REDUCERS[name](), scaled, params)[0],
            run(REDUCERS[name](), again, params)[0],
            rtol=1e-8,
        )


class Watched(nn.Module):
    """Counts the backward passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, []

    def forward(self, x):
        h = self.inner(x)
        h.register_hook(lambda grad: self.passes.append(1))
        return h


def test_a_pass_that_keeps_nothing_is_made_once():
    inner, batch = small_network()
    model = Watched(inner)
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 6, plan="fused", memory_budget=0)(params, batch)
    run(gf.coordinate_median(), rows, params)
    assert len(model.passes) == 1


@pytest.mark.parametrize("k", [-1, 0.1, 0.5, True, "1", math.nan])
def test_k_is_a_number_of_rows(k):
    with pytest.raises(ValueError, match=r"found k=.*rows to drop on each side, not a fraction"):
        gf.trimmed_mean(k)


def test_a_scheduled_k_is_rounded_down():
    link, params = gf.scheduled(gf.trimmed_mean, k=gs.linear(3.0, 6)), normal_tree(1)
    state = link.init(params)
    for step in range(7):
        matrix = random_matrix(step, 7)
        grads, state, out = link.update(unflat(matrix), state, params)
        assert_close(flat(grads), middle_mean(matrix, math.floor(out["k"])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_wider(dtype):
    matrix = random_matrix(8, 9).clamp(-1e3, 1e3).to(dtype)
    found = flat(run(gf.trimmed_mean(2), unflat(matrix), unflat(matrix[0]))[0])
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, middle_mean(matrix.double(), 2).to(dtype), rtol=0.01, atol=1e-3
    )
