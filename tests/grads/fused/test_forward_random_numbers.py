"""Dropout under plan "fused": every row has its own random numbers, which later passes repeat."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _zoo_case import Net, inputs, rows_of

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

M = 3

DROPOUTS = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.4), nn.Linear(30, 4)),
    "in-place": lambda: nn.Sequential(
        nn.Linear(6, 30), nn.Dropout(0.4, inplace=True), nn.ReLU(True), nn.Linear(30, 4)
    ),
    "of-the-input": lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(6, 4)),
    "alpha": lambda: nn.Sequential(nn.Linear(6, 30), nn.AlphaDropout(0.4), nn.Linear(30, 4)),
    "gaussian": lambda: Net(lambda net, x: net.a(x + torch.randn_like(x)), a=nn.Linear(6, 4)),
    "attention": lambda: Net(
        lambda net, x: F.scaled_dot_product_attention(
            *net.a(x.unflatten(1, (3, 2))).chunk(3, -1), dropout_p=0.4
        ),
        a=nn.Linear(2, 12),
    ),
    "multi-head": lambda: Net(
        lambda net, x: net.a(*[x.unflatten(1, (3, 2))] * 3, need_weights=False)[0],
        a=nn.MultiheadAttention(2, 1, dropout=0.4, batch_first=True),
    ),
    "recurrent": lambda: Net(
        lambda net, x: net.a(x.unflatten(1, (3, 2)))[0],
        a=nn.LSTM(2, 8, num_layers=2, dropout=0.4, batch_first=True),
    ),
}
every_dropout = pytest.mark.parametrize("name", DROPOUTS)


@every_dropout
def test_random_rows_differ_and_are_reproduced(name):
    model = DROPOUTS[name]()
    x, y = torch.randn(1, 6), torch.tensor([2])
    params, _ = gf.extract(model)
    rows = rows_of(model, (x.expand(6, -1), y.expand(6)), m=6)  # six times one sample
    assert len(set(rows.losses.tolist())) == 6
    again = rows.at(params)
    assert torch.equal(again.losses, rows.losses)
    assert all(torch.equal(again.stacked()[n], g) for n, g in rows.stacked().items())
    assert torch.equal(rows.at(params).losses, rows.losses)  # for ever
    other = rows_of(model, (x.expand(6, -1), y.expand(6)), m=6)
    assert (other.losses != rows.losses).any()


@every_dropout
def test_the_gradient_is_that_of_the_same_random_numbers(name):
    """J v is the slope of the losses along v, taken with the numbers drawn at first."""
    model, batch = DROPOUTS[name](), inputs(6)(6)
    params, _ = gf.extract(model)
    rows = rows_of(model, batch)
    v = {n: torch.randn_like(p) for n, p in params.items()}
    step = 1e-6
    ahead, behind = (
        rows.at({n: p + sign * step * v[n] for n, p in params.items()}).losses for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(rows.dot(v), slope, rtol=1e-6, atol=1e-8)


@every_dropout
def test_questions_in_any_order_are_about_one_pass(name):
    model, batch = DROPOUTS[name](), inputs(6)(6)
    rows = rows_of(model, batch)
    flat = lambda tree: torch.cat([leaf.flatten(1) for leaf in tree.values()], 1)
    gram, norms = rows.gram(), rows.sq_norms()
    unit = [rows.combine(w) for w in torch.eye(M)]
    each = torch.stack([torch.cat([g.flatten() for g in tree.values()]) for tree in unit])
    torch.testing.assert_close(gram, each @ each.T)
    torch.testing.assert_close(norms, gram.diagonal())
    torch.testing.assert_close(flat(rows.stacked()), each)


def test_dropout_in_evaluation_follows_the_loop():
    model, batch = DROPOUTS["dropout"]().eval(), inputs(6)(6)
    loop, fused = rows_of(model, batch, "loop"), rows_of(model, batch)
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_drops_the_share_it_should(inplace):
    model = Net(
        lambda net, x: net.drop(x * net.w),
        w=nn.Parameter(torch.ones(())),
        drop=nn.Dropout(0.3, inplace),
    )
    x = torch.ones(8, 5000)
    criterion = lambda output, y: (output == 0).to(output.dtype).mean() + 0 * output.sum()
    losses = rows_of(model, (x, torch.zeros(8)), m=8, criterion=criterion).losses
    torch.testing.assert_close(losses, torch.full((8,), 0.3), rtol=0, atol=0.05)
    mean = rows_of(model, (x, torch.zeros(8)), m=8, criterion=lambda out, y: out.mean()).losses
    torch.testing.assert_close(mean, torch.ones(8), rtol=0, atol=0.05)
