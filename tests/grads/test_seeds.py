"""A loss that seeds a generator draws the same numbers in every row, as in a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return self.last(self.first(x) @ self.projection())


class Made(Net):
    def projection(self):
        return torch.randn(4, 4, generator=torch.Generator().manual_seed(42))


class Forked(Net):
    def projection(self):
        with torch.random.fork_rng():
            torch.manual_seed(42)
            return torch.randn(4, 4)


class Reseeded(Net):
    def projection(self):
        torch.manual_seed(9)
        return F.dropout(torch.ones(4, 4), 0.5)


class OwnReseeded(Net):
    def projection(self):
        self.generator.manual_seed(1)  # the seed that it has
        return torch.rand(4, 4, generator=self.generator)


class SetBack(Net):
    def projection(self):
        torch.set_rng_state(torch.Generator().manual_seed(2).get_state())
        return torch.rand(4, 4)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("model", [Made, Forked, Reseeded, OwnReseeded, SetBack])
def test_rows_are_those_of_a_plain_loop(model, plan):
    plain, found = model(), model()
    torch.manual_seed(5)
    torch.rand(3)
    _, want = module_rows(plain, F.mse_loss, batch(), 4)
    torch.manual_seed(5)
    torch.rand(3)
    params, _ = gf.extract(found)
    grads_of = gf.microbatch_grads(gf.model_loss(found, F.mse_loss), 4, plan=plan)
    if plan == "auto":
        with pytest.warns(UserWarning, match="seeds or sets a generator"):
            rows = grads_of(params, batch())
    else:
        rows = grads_of(params, batch())
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["fused", "vmap"])
@pytest.mark.parametrize("model", [Made, Forked, Reseeded, OwnReseeded, SetBack])
def test_plans_over_all_rows_refuse_it(model, plan):
    found = model()
    params, _ = gf.extract(found)
    torch.manual_seed(5)
    torch.rand(3)
    with pytest.raises(RuntimeError, match="seeds or sets a generator and draws from it"):
        gf.microbatch_grads(gf.model_loss(found, F.mse_loss), 4, plan=plan)(params, batch())


class Draws(Net):
    def projection(self):
        own = torch.rand(4, 4, generator=self.generator)
        return F.dropout(torch.rand(4, 4), 0.5) + own + torch.bernoulli(own)


@pytest.mark.parametrize("plan", ["fused", "vmap"])
@pytest.mark.parametrize("before", [0, 3])
def test_draws_without_seeding_stay_in_one_pass(plan, before):
    """Also from a generator that was seeded just before the pass."""
    found = Draws()
    params, _ = gf.extract(found)
    grads_of = gf.microbatch_grads(gf.model_loss(found, F.mse_loss), 4, plan=plan)
    torch.manual_seed(5)
    torch.rand(before)
    rows = grads_of(params, batch())
    assert len({float(leaf) for leaf in rows.stacked()["last.bias"][:, 0]}) == 4
    again = rows.at(params).stacked()
    for name, leaf in rows.stacked().items():
        torch.testing.assert_close(again[name], leaf, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_layers_that_draw_nothing_right_after_a_seed(plan):
    """Dropout that is off, and attention without dropout, are asked like draws."""

    class Off(Net):
        def projection(self):
            zero = F.dropout(torch.ones(4, 4), 0.0) * F.dropout(torch.ones(4, 4), 0.5, False)
            return zero + F.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4)] * 3)[0, 0]

    found = Off()
    params, _ = gf.extract(found)
    grads_of = gf.microbatch_grads(gf.model_loss(found, F.mse_loss), 4, plan=plan)
    for _ in range(3):
        torch.manual_seed(5)
        grads_of(params, batch())
