"""A weight in several products: the positions of all uses are one sum, with its cross terms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows, off, side_by_side
from gradfilter.grads.fused import _factors
from gradfilter.grads.fused._factors import DenseFactor, OuterFactor, join_uses

WIDTH, STEPS, M = 5, 4, 3


class Unrolled(nn.Module):
    """A cell at every time step."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Twice(nn.Module):
    """A weight in a linear layer, transposed in another, in a product, and by itself."""

    def __init__(self, alone):
        super().__init__()
        self.w, self.alone = nn.Parameter(torch.randn(WIDTH, WIDTH)), alone

    def forward(self, x):
        h = F.linear(x, self.w).tanh()
        h = (h @ self.w + F.linear(h, self.w.t())).sum(1)
        return h + self.w.sin().sum(0) if self.alone else h


MODELS = {
    "RNNCell": lambda: Unrolled(nn.RNNCell),
    "GRUCell": lambda: Unrolled(nn.GRUCell),
    "LSTMCell": lambda: Unrolled(nn.LSTMCell),
    "twice": lambda: Twice(False),
    "twice, and alone": lambda: Twice(True),
}


def spread(y, target):
    places = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return (y * torch.cos(places) * (1 + target.sum())).mean()


@pytest.mark.parametrize("ghosts", [0.0, 1e9], ids=["materialised", "ghost"])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_several_uses_have_the_rows_of_ordinary_passes(name, b, ghosts, monkeypatch):
    monkeypatch.setattr(_factors, "LARGE_SUM", ghosts)
    torch.manual_seed(0)
    model = MODELS[name]().double()
    batch = torch.randn(M * b, STEPS, WIDTH).double(), torch.rand(M * b).double()
    _, want = module_rows(model, spread, batch, M)
    matrix = side_by_side(want, want)
    params = gf.extract(model)[0]
    weights = torch.linspace(-0.7, 1.3, M, dtype=torch.float64)
    for budget in (0.25, 0):
        grads_of = gf.microbatch_grads(
            gf.model_loss(model, spread), M, plan="fused", memory_budget=budget
        )
        rows = grads_of(params, batch)
        torch.testing.assert_close(rows.gram(), matrix @ matrix.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rows.sq_norms(), (matrix**2).sum(1), rtol=1e-10, atol=1e-12)
        total = rows.combine(weights)
        assert off(torch.cat([total[n].flatten() for n in want]), weights @ matrix) < 1e-10
        assert off(side_by_side(rows.stacked(), want), matrix) < 1e-10
    modes = {layer.mode for layer in rows.layers if len(layer.shape) == 2}
    assert budget == 0 and (modes == {"ghost"}) == (ghosts > 0)


def test_only_outer_products_of_one_size_are_joined():
    a, b = (OuterFactor(torch.randn(2, n, 3), torch.randn(2, n, 4), (4, 3)) for n in (1, 5))
    other = OuterFactor(torch.randn(2, 1, 4), torch.randn(2, 1, 3), (4, 3))
    dense = DenseFactor(torch.randn(2, 4, 3))
    joined = join_uses([a, dense, other, b])
    assert [type(f) for f in joined] == [OuterFactor, OuterFactor, DenseFactor]
    shape = torch.Size((4, 3))
    first = OuterFactor(joined[0].inputs, joined[0].outputs, shape)
    want = (
        OuterFactor(a.inputs, a.outputs, shape).rows()
        + OuterFactor(b.inputs, b.outputs, shape).rows()
    )
    torch.testing.assert_close(first.rows(), want)
