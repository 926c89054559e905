"""`clip_per_row` with limits that are not numbers, leaf by leaf, and `normalize_rows`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import BAD, SHAPES, assert_close, flat, normal, random_matrix, unflat, zeros

MIXED = ("plain",) * 5 + ("zero", "tiny", *BAD)
seeds = st.integers(0, 2**20)
levels = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


def leaf_norms(matrix):
    """The norms of the leaves of every row. (M, L)."""
    rows = unflat(matrix).values()
    return torch.stack([leaf.reshape(len(matrix), -1).norm(dim=1) for leaf in rows], 1)


def clipped_to(matrix, limits):
    """Rows scaled down to limits (M,), or the leaves of rows to limits (M, L)."""
    norms = matrix.norm(dim=1) if limits.ndim == 1 else leaf_norms(matrix)
    factors = torch.where(norms.isfinite() & (norms > limits), limits / norms, 1.0)
    if limits.ndim == 1:
        return matrix * factors[:, None]
    each = zip(unflat(matrix).items(), factors.unbind(1), strict=True)
    scaled = {n: leaf * own.reshape(-1, *[1] * (leaf.ndim - 1)) for (n, leaf), own in each}
    return flat(scaled, batch_dims=1)


def counting(norms):
    return [n for n in norms.tolist() if math.isfinite(n) and n > 0]


@given(seeds, levels, st.floats(0.0, 0.95))
def test_a_quantile_of_earlier_steps(seed, level, decay):
    clip, params = gf.clip_per_row(gf.quantile(level, decay=decay)), zeros()
    state, limit = clip.init(params), math.inf
    for step in range(4):
        matrix = random_matrix(seed + step, 1 + (seed + step) % 6, MIXED)
        rows, state, out = clip.update(unflat(matrix), state, params)
        norms = matrix.norm(dim=1)
        limits = torch.full_like(norms, limit)
        usable = norms.isfinite() & (norms > 0)
        expected = matrix.clone()
        expected[usable] = clipped_to(matrix[usable], limits[usable])
        assert_close(flat(rows.stacked(), batch_dims=1), expected)
        assert_close(out["norm"], norms)
        if seen := counting(norms):
            found = np.quantile(seen, level)
            limit = found if limit == math.inf else decay * limit + (1 - decay) * found


@given(seeds, levels)
def test_a_quantile_for_every_leaf(seed, level):
    clip = gf.clip_per_row(gf.quantile(level, decay=0.5), per_leaf=True)
    params, limits = zeros(), torch.full((len(SHAPES),), torch.inf, dtype=torch.float64)
    state = clip.init(params)
    for step in range(3):
        matrix = random_matrix(seed + step, 5)
        rows, state, out = clip.update(unflat(matrix), state, params)
        norms = leaf_norms(matrix)
        assert_close(flat(rows.stacked(), batch_dims=1), clipped_to(matrix, limits.expand(5, -1)))
        assert_close(out["norm"], norms)
        found = torch.from_numpy(np.quantile(norms.numpy(), level, axis=0))
        limits = torch.where(limits.isfinite(), (limits + found) / 2, found)


@given(seeds, st.integers(1, 6))
def test_all_rows_get_the_length_of_the_smallest(seed, count):
    matrix = random_matrix(seed, count, MIXED)
    norms = matrix.norm(dim=1)
    rows, _, _ = gf.clip_per_row("smallest").update(unflat(matrix), {}, zeros())
    found = rows.sq_norms().sqrt()
    smallest = min(counting(norms), default=0.0)
    for n, row in zip(norms.tolist(), found.tolist(), strict=True):
        if math.isfinite(n):
            assert row == pytest.approx(smallest if n > 0 else 0.0, rel=1e-9)
        else:
            assert not math.isfinite(row)


@given(seeds, st.floats(0.01, 10.0))
def test_leaf_by_leaf_the_whole_row_keeps_the_limit(seed, limit):
    matrix = random_matrix(seed, 4)
    clip = gf.clip_per_row(limit, per_leaf=True)
    rows, _, _ = clip.update(unflat(matrix), {}, zeros())
    each = torch.full((4, len(SHAPES)), limit / math.sqrt(len(SHAPES)), dtype=torch.float64)
    assert_close(flat(rows.stacked(), batch_dims=1), clipped_to(matrix, each))
    assert (rows.sq_norms().sqrt() <= limit * (1 + 1e-9)).all()


@given(seeds, st.sampled_from([0.0, 0.01, 2.0]))
def test_normalized_rows_follow_the_formula(seed, gamma):
    matrix = random_matrix(seed, 5, MIXED)
    rows, _, out = gf.normalize_rows(gamma).update(unflat(matrix), {}, zeros())
    for row, given_row, norm in zip(
        flat(rows.stacked(), batch_dims=1), matrix, out["norm"], strict=True
    ):
        assert_close(norm, given_row.norm())
        length = given_row.norm().item() + gamma
        usable = math.isfinite(length) and length > 0
        assert_close(row, given_row / length if usable else given_row)


def test_a_row_that_was_removed_does_not_move_the_quantile():
    clip, params = gf.clip_per_row(gf.quantile(0.5)), zeros()
    matrix = normal(5, flat(zeros()).numel())
    factors = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    matrix[1] *= 1e6
    matrix[3] = torch.nan
    rows = gf.DenseStack(unflat(matrix)).scaled(factors)
    _, state, _ = clip.update(rows, clip.init(params), params)
    assert_close(state["limit"], matrix[[0, 2, 4]].norm(dim=1).median())


def test_skipped_steps_move_the_quantile():
    update = gf.chain(gf.clip_per_row(gf.quantile(0.5)), gf.mean_rows(), gf.sgd(0.1))
    params = zeros()
    rows = unflat(normal(4, flat(params).numel()))
    state = update.init(params)
    moved, after, _ = update(params, state, rows, keep=torch.tensor(False))
    assert_close(flat(moved), flat(params))
    assert after["clip_per_row"]["count"] == 1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples(step):
    return normal(12, 4, seed=step) * (1 + step), torch.arange(12) % 3


LIMITS = {
    "quantile": lambda: gf.clip_per_row(gf.quantile(0.5, decay=0.7)),
    "quantile per leaf": lambda: gf.clip_per_row(gf.quantile(0.5, decay=0.7), per_leaf=True),
    "number per leaf": lambda: gf.clip_per_row(0.1, per_leaf=True),
    "masked quantile": lambda: gf.masked(
        gf.clip_per_row(gf.quantile(0.5)), lambda name: name.endswith("weight")
    ),
    "normalized": gf.normalize_rows,
}
# Their state is inside another one, so that the rows are held and compared.
NOT_IN_PARTS = {
    "gated": lambda: gf.gate(gf.clip_per_row(gf.quantile(0.5)), "late"),
    "at times": lambda: gf.every(2, gf.clip_per_row(gf.quantile(0.5))),
    "nested": lambda: gf.named("in", gf.chain(gf.finite_filter(), LIMITS["quantile"]())),
}


@pytest.mark.parametrize("name", [*LIMITS, *NOT_IN_PARTS])
def test_rows_in_parts_give_the_same_steps_and_states(name):
    """The quantile of a step is that of all its rows, not of the last part."""
    update = gf.chain({**LIMITS, **NOT_IN_PARTS}[name](), gf.mean_rows(), gf.sgd(0.1))
    loss = gf.model_loss(network(), F.cross_entropy)
    states = []
    for at_once in (None, 5):
        step = gf.train_step(loss, update, rows_at_once=at_once)
        state = step.init(network(), seed=0)
        for number in range(3):
            state, info = step(state, samples(number), late=torch.tensor(True))
        flat_state = gf.state_dict({"params": state["params"], "own": state["transforms"]})
        states.append({**flat_state, **{k: v for k, v in info.items() if k != "loss"}})
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert_close(states[1][key], value)


@pytest.mark.parametrize("name", LIMITS)
def test_compiled_steps_are_the_same(name):
    update = gf.chain(LIMITS[name](), gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(network(), F.cross_entropy), update)
    compiled = gf.compile(step, backend="graph")
    one = two = step.init(network(), seed=0)
    for number in range(3):
        one, info = step(one, samples(number))
        two, found = compiled(two, samples(number))
        assert_close(found["loss"], info["loss"])
    assert_close(flat(two["params"]), flat(one["params"]))


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
def test_rows_of_a_network_by_ordinary_backward_passes(plan):
    """Per-leaf clips and quantiles of the gradients that torch gives sample by sample."""
    model = network()
    update = gf.chain(LIMITS["quantile per leaf"](), gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, plan=plan)
    state = step.init(model, seed=0)
    plain, limits = network(), None
    for number in range(3):
        x, y = samples(number)
        total = [torch.zeros_like(p) for p in plain.parameters()]
        norms = []
        for m in range(len(x)):
            loss = F.cross_entropy(plain(x[m : m + 1]), y[m : m + 1])
            grads = torch.autograd.grad(loss, list(plain.parameters()))
            norms.append([g.norm().item() for g in grads])
            for i, g in enumerate(grads):
                scale = 1.0 if limits is None else min(1.0, limits[i] / norms[-1][i])
                total[i] += scale * g / len(x)
        with torch.no_grad():
            for p, g in zip(plain.parameters(), total, strict=True):
                p -= 0.1 * g
        found = np.quantile(np.array(norms), 0.5, axis=0)
        limits = found if limits is None else 0.7 * limits + 0.3 * found
        state, _ = step(state, (x, y))
    for (name, p), leaf in zip(plain.named_parameters(), state["params"].values(), strict=True):
        torch.testing.assert_close(leaf, p.detach(), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gf.clip_per_row(0.0), "max_norm"),
        (lambda: gf.clip_per_row("largest"), "\"smallest\", found 'largest'"),
        (lambda: gf.quantile(1.5), "level"),
        (lambda: gf.quantile(0.5, decay=1.0), "decay"),
        (lambda: gf.normalize_rows(-1.0), "gamma"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
