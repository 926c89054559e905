"""`outlier_filter` and `trim_losses` against sorting in Python."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import BAD, assert_close, flat, normal, random_matrix, unflat, zeros

MIXED = ("plain",) * 4 + ("zero", *BAD)
seeds = st.integers(0, 2**20)


def stack(matrix, losses=None, live=None):
    rows = gf.DenseStack(unflat(matrix), losses=losses)
    return rows if live is None else rows.scaled(live)


@given(seeds, st.floats(1.0, 4.0), st.sampled_from(["median", "mean"]), st.integers(1, 9))
def test_long_rows_are_removed(seed, factor, center, count):
    matrix = random_matrix(seed, count, MIXED)
    live = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.8
    given_rows = stack(matrix, live=live.double())
    rows, _, out = gf.outlier_filter(factor, center=center).update(given_rows, {}, zeros())
    norms = matrix.norm(dim=1).tolist()
    known = [n for n, here in zip(norms, live.tolist(), strict=True) if here and math.isfinite(n)]
    middle = getattr(statistics, center)(known) if known else math.nan
    accepted = [
        here and math.isfinite(n) and n <= factor * middle * (1 + 1e-12)
        for n, here in zip(norms, live.tolist(), strict=True)
    ]
    assert out["accepted"].tolist() == accepted == rows.live.tolist()
    assert out["keep"].item() is any(accepted)
    assert_close(out["limit"].item(), factor * middle)


@given(seeds, st.floats(1.0, 4.0), st.integers(1, 9))
def test_rows_of_high_loss_are_removed(seed, factor, count):
    losses = normal(count, seed=seed).exp()
    matrix = random_matrix(seed, count)
    rows = gf.outlier_filter(factor, of="loss").update(stack(matrix, losses), {}, zeros())[0]
    limit = factor * statistics.median(losses.tolist())
    assert rows.live.tolist() == [x <= limit * (1 + 1e-12) for x in losses.tolist()]


@given(seeds, st.floats(0.0, 0.99), st.integers(1, 12))
def test_the_highest_losses_are_trimmed(seed, fraction, count):
    """Equal losses and NaN too: sorted in Python."""
    g = torch.Generator().manual_seed(seed)
    losses = torch.randint(0, 4, (count,), generator=g).double()
    losses[torch.rand(count, generator=g) < 0.1] = torch.nan
    live = torch.rand(count, generator=g) < 0.8
    matrix = random_matrix(seed, count)
    rows, _, out = gf.trim_losses(fraction).update(
        stack(matrix, losses, live.double()), {}, zeros()
    )
    taking_part = [m for m in range(count) if live[m]]
    key = lambda m: (math.inf if losses[m].isnan() else losses[m].item(), m)
    kept = len(taking_part) - math.floor(fraction * len(taking_part) + 1e-9)
    expected = {*sorted(taking_part, key=key)[:kept]}
    assert {m for m in range(count) if out["accepted"][m]} == expected
    assert rows.live.tolist() == out["accepted"].tolist()


def test_29_percent_of_a_hundred_are_29():
    losses = torch.arange(100).double()
    rows = gf.DenseStack({"w": torch.ones(100, 1)}, losses=losses)
    out = gf.trim_losses(0.29).update(rows, {}, {"w": torch.zeros(1)})[2]
    assert out["accepted"].sum() == 71


@pytest.mark.parametrize("plan", ["loop", "fused"])
def test_a_training_with_trimmed_losses_by_ordinary_backward_passes(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    update = gf.chain(gf.trim_losses(0.25), gf.mean_rows(), gf.sgd(0.3, momentum=0.9))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, plan=plan)
    state = step.init(model, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for number in range(10):
        x, y = normal(8, 4, seed=number), torch.arange(8) % 3
        state, _ = step(state, (x, y))
        losses = F.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        losses.sort().values[:6].mean().backward()
        optimizer.step()
    assert_close(flat(state["params"]), flat(dict(model.named_parameters())).detach(), rtol=1e-9)


def test_a_scheduled_fraction():
    trim = gf.scheduled(gf.trim_losses, fraction=gf.schedules.linear(0.5, 10))
    update = gf.chain(trim, gf.mean_rows(), gf.sgd(0.1))
    rows = gf.DenseStack({"w": torch.ones(10, 1)}, losses=torch.arange(10.0))
    params = {"w": torch.zeros(1)}
    _, _, info = update(params, update.init(params), rows)
    assert info["trim_losses/accepted"].sum() == 5


def test_no_row_left_skips_the_step():
    update = gf.chain(gf.outlier_filter(), gf.mean_rows(), gf.sgd(0.1))
    params = zeros()
    rows = stack(torch.full((3, flat(params).numel()), torch.nan, dtype=torch.float64))
    moved, _, info = update(params, update.init(params), rows)
    assert not info["keep"]
    assert_close(flat(moved), flat(params))


@pytest.mark.parametrize(
    "make", [lambda: gf.trim_losses(0.1), lambda: gf.outlier_filter(of="loss")]
)
def test_rows_without_losses_are_refused(make):
    with pytest.raises(ValueError, match="expected rows with losses, found none"):
        make().update(stack(random_matrix(0, 3)), {}, zeros())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gf.outlier_filter(0.5), "factor"),
        (lambda: gf.outlier_filter(of="size"), "of as one of"),
        (lambda: gf.outlier_filter(center="mode"), "center as one of"),
        (lambda: gf.trim_losses(1.0), "fraction"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
