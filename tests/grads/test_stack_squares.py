"""Weighted sums of squared rows: of every stack and of every kind of layer."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import ConvBN, Dropped, Tied, images, token_loss, tokens, vectors
from gradfilter import _products
from gradfilter.grads import _row_parts
from gradfilter.grads._joined_stacks import choose, join
from gradfilter.grads.fused import _factors

pytestmark = pytest.mark.usefixtures("float64")
PLANS = ("fused", "loop", "vmap")


class Bags(nn.Module):
    """A lookup with repeated units in a row, wider or narrower than the row is long."""

    def __init__(self, width, units=5):
        super().__init__()
        self.table, self.head = nn.Embedding(units, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.table((5 * x.abs()).long() % 5).mean(1).tanh())


class Branching(nn.Module):
    """Rows that use a layer twice, and rows that use it once."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.head(self.body(hidden).tanh() if x[0, 0] > 0 else hidden)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


CASES = {
    "linear": (mlp, vectors, F.cross_entropy),
    "conv and batch norm": (ConvBN, images, F.cross_entropy),
    "grouped conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
        ),
        images,
        F.cross_entropy,
    ),
    "dropout": (Dropped, vectors, F.cross_entropy),
    "narrow bags": (partial(Bags, 2), vectors, F.cross_entropy),
    "wide bags": (partial(Bags, 9), vectors, F.cross_entropy),
    "large table": (partial(Bags, 3, 200), vectors, F.cross_entropy),
    "tied": (Tied, tokens, token_loss),
    "branches": (Branching, vectors, F.cross_entropy),
}


def rows_of(case, plan="fused", m=4, **options):
    torch.manual_seed(0)
    model, data, criterion = CASES[case]
    model, batch = model(), data(12)
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), m, plan=plan, **options)
    return grads_of(params, batch, buffers=buffers)


def naive(rows, weights):
    """Sum the squares of the rows of weight other than 0 one after the other, in float64."""
    found = {}
    for name, leaf in rows.items():
        total = torch.zeros(leaf.shape[1:], dtype=torch.float64)
        for row, weight in zip(leaf.double(), weights.tolist(), strict=True):
            if weight != 0:
                total = total + weight * row**2
        found[name] = total
    return found


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(
            found[name].double(), leaf, rtol=1e-6, atol=1e-12, equal_nan=True
        )


def some(count):
    weights = torch.linspace(0.5, 2, count)
    weights[count // 2] = 0
    return weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("m", [1, 4, 12])
@pytest.mark.parametrize("budget", [0, 0.25])
@pytest.mark.parametrize("small", [False, True])
def test_every_layer(case, m, budget, small, monkeypatch):
    if small:
        monkeypatch.setattr(_factors, "TILE", 1)
        monkeypatch.setattr(_products, "SQUARES", 1)
    weights = some(m) if m > 1 else torch.tensor([1.5])
    rows = rows_of(case, m=m, memory_budget=budget)
    squares = rows.sum_squares(weights)
    check(squares, naive(rows.stacked(), weights))
    factors = torch.linspace(-1, 2, m)
    cut = rows.scaled(factors).columns(list(rows.shapes)[:2]).first(m - 1 or 1)
    check(cut.sum_squares(weights[: len(cut)]), naive(cut.stacked(), weights[: len(cut)]))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan):
    rows = rows_of("linear", plan)
    check(rows.sum_squares(some(4)), naive(rows.stacked(), some(4)))


def test_one_position_takes_a_product_and_no_rows(monkeypatch):
    def refuse(*_):
        raise AssertionError("rows")

    monkeypatch.setattr(_factors.OuterFactor, "rows", refuse)
    rows_of("linear", m=12).columns(["0.weight", "3.weight"]).sum_squares(torch.ones(12))


def test_lookups_take_no_table_per_row(monkeypatch):
    def refuse(*_):
        raise AssertionError("rows")

    monkeypatch.setattr(_factors.EmbeddingFactor, "rows", refuse)
    rows_of("large table").columns(["table.weight"]).sum_squares(torch.ones(4))


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_of_weight_0_is_masked(plan):
    torch.manual_seed(0)
    model, (x, y) = mlp(), vectors(12)
    x[4] = torch.nan
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 12, plan=plan)
    rows = grads_of(gf.extract(model)[0], (x, y))
    weights = torch.ones(12)
    assert rows.sum_squares(weights)["0.weight"].isnan().all()
    weights[4] = 0
    found = rows.sum_squares(weights)
    check(found, naive(rows.stacked(), weights))
    assert all(leaf.isfinite().all() for leaf in found.values())
    removed = rows.scaled(weights)
    check(removed.sum_squares(torch.ones(12)), naive(rows.stacked(), weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_do_not_underflow(dtype):
    rows = {"w": torch.tensor([[1e-6, 2.0], [3e-6, 1.0]]).to(dtype)}
    found = gf.DenseStack(rows).sum_squares(torch.ones(2))
    assert found["w"].dtype == torch.float32 and found["w"][0] > 0
    check(found, naive(rows, torch.ones(2)))


def test_joined_chosen_repeated_and_parted_stacks():
    rows, other = rows_of("linear"), rows_of("linear").scaled(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    names = list(rows.shapes)
    joined = join(rows.columns(names[:2]), other.columns(names[2:]))
    check(joined.sum_squares(some(4)), naive(joined.stacked(), some(4)))
    for when in (True, False):
        chosen = choose(torch.tensor(when), rows, other)
        check(chosen.sum_squares(some(4)), naive(chosen.stacked(), some(4)))
    repeated = _row_parts.without_rows(rows_of("linear", "loop").scaled(some(4)))
    assert type(repeated).__name__ == "RepeatedStack"
    check(repeated.sum_squares(some(4)), naive(repeated.stacked(), some(4)))
    parted = _row_parts.PartedStack([rows, repeated])
    check(parted.sum_squares(some(8)), naive(parted.stacked(), some(8)))


def test_groups_of_samples():
    torch.manual_seed(0)
    model, batch = mlp(), vectors(12)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3)
    rows = grads_of(gf.extract(model)[0], batch, groups=torch.arange(12) % 3).scaled(some(3))
    check(rows.sum_squares(some(3)), naive(rows.stacked(), some(3)))


def test_a_leaf_that_the_loss_does_not_use():
    loss = lambda params, x: (params["w"] * x).mean()
    params = {"w": torch.ones(2), "unused": torch.ones(3), "none": torch.ones(0)}
    rows = gf.microbatch_grads(loss, 2)(params, torch.randn(4, 2))
    found = rows.sum_squares(torch.ones(2))
    check(found, naive(rows.stacked(), torch.ones(2)))
    assert found["unused"].tolist() == [0, 0, 0] and found["none"].shape == (0,)


def test_one_weight_per_row():
    for rows in (rows_of("linear"), rows_of("linear", "loop")):
        with pytest.raises(ValueError, match=r"weights of shape \(4,\), found \(3,\)"):
            rows.sum_squares(torch.ones(3))
