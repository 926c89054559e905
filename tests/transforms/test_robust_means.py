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
from _cases import make_params, make_rows, make_stack
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
    "geometric_median": gf.geometric_median,
    "centered_clip": lambda: gf.centered_clip(1.0, steps=2),
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


@pytest.mark.parametrize("name", ["trimmed_mean", "coordinate_median", "geometric_median"])
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


# --- Weighted means of whole rows ---


def geometric_loop(matrix, steps, eps):
    """Weiszfeld's iteration on the rows themselves; rows that are not finite are left out."""
    rows = [row for row in matrix if row.isfinite().all()]
    if 2 * len(rows) <= len(matrix):
        return torch.full_like(matrix[0], math.nan)
    norms = sorted(row.norm().item() for row in rows)
    middle = norms[(len(rows) - 1) // 2] or norms[-1] or 1.0
    v, smallest = torch.zeros_like(matrix[0]), middle
    for _ in range(steps + 1):
        weights = [1 / max((row - v).norm().item(), smallest) for row in rows]
        v = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
        smallest = eps * middle
    return v


@given(seed=seeds, rows=st.integers(1, 9), steps=st.integers(1, 9))
def test_geometric_median_is_weiszfelds_iteration(seed, rows, steps):
    matrix = random_matrix(seed, rows, ("plain", "plain", "plain", "zero", *BAD))
    grads, out = run(gf.geometric_median(steps, eps=0.01), unflat(matrix))
    scale = max([1e-9, *(row.norm().item() for row in matrix if row.isfinite().all())])
    assert_close(flat(grads) / scale, geometric_loop(matrix, steps, 0.01) / scale, atol=1e-7)
    if flat(grads).isfinite().all():
        assert_close(out["weights"].sum(), torch.ones((), dtype=torch.float64))
        assert torch.equal(out["weights"] > 0, matrix.isfinite().all(1))
    assert torch.equal(out["distance"].isnan(), ~matrix.isfinite().all(1))


@given(seed=seeds, rows=st.integers(3, 9))
def test_no_point_nearby_has_a_smaller_sum_of_distances(seed, rows):
    matrix = random_matrix(seed, rows)
    v = flat(run(gf.geometric_median(400, eps=1e-6), unflat(matrix))[0])
    total = lambda point: (matrix - point).norm(dim=1).sum()
    for scale in (1e-3, 1e-2, 1.0):
        away = torch.randn(20, WIDTH, dtype=torch.float64) * scale * matrix.norm(dim=1).median()
        assert all(total(v) <= total(v + move) * (1 + 1e-5) for move in away)
    assert all(total(v) <= total(row) * (1 + 1e-5) for row in matrix)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("rows", [3, 4, 8])
def test_a_minority_of_rows_moves_it_a_bounded_distance(rows, size):
    matrix = 1 + 0.1 * torch.randn(rows, WIDTH, dtype=torch.float64)
    honest = matrix.clone()
    bad = (rows - 1) // 2
    matrix[:bad] *= -size
    found = flat(run(gf.geometric_median(), unflat(matrix))[0])
    assert (found - honest[bad:].mean(0)).norm() < honest[bad:].std(0).norm() * 4
    assert (flat(run(gf.mean_rows(), unflat(matrix))[0])).norm() > size / 10


@every_reducer
def test_a_minority_that_is_not_finite_is_left_out_and_a_half_shows(name):
    for rows in (1, 2, 5, 6):
        for bad in range(rows + 1):
            matrix = random_matrix(rows, rows)
            matrix[:bad] = math.nan
            found = flat(run(REDUCERS[name](), unflat(matrix))[0])
            allowed = min(1, (rows - 1) // 2) if name == "trimmed_mean" else (rows - 1) // 2
            assert found.isfinite().all() == (bad <= allowed)


@given(seed=seeds)
def test_distances_by_products_are_those_by_the_gram(seed):
    matrix = random_matrix(seed, 6, ("plain", "plain", "zero", "nan"))
    stack = gf.DenseStack(unflat(matrix))
    expected = run(gf.geometric_median(), stack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gf.DenseStack, "gram_is_cheap", lambda self: False)
        patch.setattr(gf.DenseStack, "gram", None)
        found = run(gf.geometric_median(), stack)
    assert_close(found[1]["weights"], expected[1]["weights"], rtol=1e-5, atol=1e-7)


def test_zero_rows_are_rows():
    matrix = torch.zeros(5, WIDTH, dtype=torch.float64)
    assert_same(flat(run(gf.geometric_median(), unflat(matrix))[0]), matrix[0])
    matrix[:2] = 1
    found = flat(run(gf.geometric_median(50), unflat(matrix))[0])
    assert 0 <= found.amax() < 0.01  # most rows are at zero


def test_sam_perturb_combines_by_the_weights_of_the_median():
    params = make_params(torch.float64)
    stack = make_stack(params, make_rows(params))
    update = gf.chain(gf.geometric_median(), gf.sam_perturb(0.3))
    grads, _, out = update.update(stack, update.init(params), params)
    by_hand = gf.aggregate(lambda gram: out["weights"])
    same = gf.chain(by_hand, gf.sam_perturb(0.3))
    assert_close(grads, same.update(stack, same.init(params), params)[0])


def clipped_loop(matrix, v, radius, steps):
    """Repeat v ← v + mean of the clipped differences, on the rows themselves."""
    for _ in range(steps):
        moves = []
        for row in matrix:
            far = (row - v).norm().item()
            finite = bool(row.isfinite().all())
            moves.append((row - v) * min(1, radius / far) if finite and far else 0 * v)
        v = v + sum(moves) / len(matrix)
    return v


@given(seed=seeds, rows=st.integers(1, 7), steps=st.integers(1, 3))
def test_centered_clip_moves_the_last_result(seed, rows, steps):
    clip, v = gf.centered_clip(0.7, steps=steps), torch.zeros(WIDTH, dtype=torch.float64)
    state = clip.init(zeros())
    for k in range(6):
        matrix = random_matrix(seed + k, rows).clamp(-3, 3)
        if k == 2 and rows > 2:
            matrix[1, 3] = math.inf
        grads, state, out = clip.update(unflat(matrix), state, zeros())
        before, v = v, clipped_loop(matrix, v, 0.7, steps)
        assert_close(flat(grads), v, atol=1e-7)
        assert_same(state["centre"], grads)
        finite = matrix.isfinite().all(1)
        near = clipped_loop(matrix, before, 0.7, steps - 1)
        expected = torch.where(finite, (matrix - near).norm(dim=1), math.nan)
        assert_close(out["distance"], expected, atol=1e-6)
        assert_close(
            out["clipped_fraction"].double(),
            (expected[finite] > 0.7).double().mean(),
            rtol=1e-5,
        )


def test_with_an_infinite_radius_it_is_the_mean():
    clip, state = gf.centered_clip(math.inf), None
    state = clip.init(zeros())
    for k in range(3):
        rows = unflat(random_matrix(k, 5))
        grads, state, _ = clip.update(rows, state, zeros())
        assert_close(grads, run(gf.mean_rows(), rows)[0], atol=1e-9)


def test_a_row_pulls_by_the_radius_at_most():
    matrix = random_matrix(3, 5)
    for bad in (matrix[0], -1e9 * matrix[0]):
        moved = torch.cat([matrix[1:], bad[None]])
        found = flat(run(gf.centered_clip(2.0), unflat(moved))[0])
        without = torch.cat([matrix[1:], torch.zeros_like(matrix[:1])])
        assert (found - flat(run(gf.centered_clip(2.0), unflat(without))[0])).norm() < 0.4 + 1e-9


def test_a_skipped_step_leaves_the_centre():
    update = gf.chain(gf.centered_clip(1.0), gf.sgd(0.1))
    params = normal_tree(0)
    state = update.init(params)
    for k in range(2):
        params, state, _ = update(params, state, unflat(random_matrix(k, 4)))
    after = update(params, state, unflat(random_matrix(5, 4)), keep=torch.tensor(False))[1]
    assert_same(gf.state_dict(after), gf.state_dict(state))
    assert state["centered_clip"]["centre"]["fc.weight"].any()


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "2"])
def test_steps_are_a_whole_number(steps):
    for make in (lambda: gf.geometric_median(steps), lambda: gf.centered_clip(1.0, steps=steps)):
        with pytest.raises(ValueError, match=r"steps as a whole number >= 1, found steps=.*iterat"):
            make()


@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, "1"])
def test_eps_and_radius_are_above_zero(value):
    with pytest.raises(ValueError, match=r"geometric_median: expected 0 < eps, found.*median norm"):
        gf.geometric_median(eps=value)
    with pytest.raises(ValueError, match=r"centered_clip: expected 0 < radius, found.*distance"):
        gf.centered_clip(value)


@pytest.mark.parametrize("name", ["geometric_median", "centered_clip"])
def test_bfloat16_follows_double(name):
    matrix = random_matrix(9, 8).clamp(-3, 3).bfloat16()
    params = unflat(matrix[0])
    found = flat(run(REDUCERS[name](), unflat(matrix), params)[0])
    assert found.dtype == torch.bfloat16
    expected = flat(run(REDUCERS[name](), unflat(matrix.double()))[0])
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@every_reducer
def test_a_compiled_step_is_the_step(name):
    model, batch = small_network()
    update = gf.chain(REDUCERS[name](), gf.sgd(0.1, momentum=0.9))
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, update, microbatches=6)
    compiled = gf.compile(step, backend="graph")
    states = [step.init(model, seed=0)] * 2
    for _ in range(3):
        states[0], info = step(states[0], batch)
        states[1], found = compiled(states[1], batch)
        assert_close(states[1]["params"], states[0]["params"])
        assert_close(dict(found), dict(info))
