"""Backward passes that are not linear: a first combination is that of the rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf

pytestmark = pytest.mark.usefixtures("float64")


class Clipped(torch.autograd.Function):
    """The identity, with its gradient clipped, written for vmap or not."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.02, 0.02)


class ClippedByVmap(Clipped):
    generate_vmap_rule = True


def hooked(h):
    h = h.sin()
    h.register_hook(lambda g: g / (0.1 + g.norm()))
    return h


def hooked_node(h):
    h = h.sin()
    h.grad_fn.register_prehook(lambda grads: (grads[0] / (0.1 + grads[0].norm()),))
    return h


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.a, self.middle, self.b = nn.Linear(3, 4), middle, nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


MIDDLES = {
    "function": Clipped.apply,
    "function for vmap": ClippedByVmap.apply,
    "tensor hook": hooked,
    "hook on the node": hooked_node,
}


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_a_combination_is_that_of_the_rows(middle, plan, count):
    model = Net(MIDDLES[middle])
    x, y, weights = torch.randn(2 * count, 3), torch.randn(2 * count, 2), torch.randn(count)
    params, _ = gf.extract(model)
    criterion = nn.functional.mse_loss
    rows = gf.microbatch_grads(gf.model_loss(model, criterion), count, plan=plan)(params, (x, y))
    found = rows.combine(weights)
    wanted = {name: torch.zeros_like(p) for name, p in params.items()}
    for m in range(count):
        model.zero_grad()
        criterion(model(x[2 * m : 2 * m + 2]), y[2 * m : 2 * m + 2]).backward()
        for name, p in model.named_parameters():
            wanted[name] += weights[m] * p.grad
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_hooks_on_parameters_run_on_rows_of_their_own_weights_in_chunks(plan, chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
    params, _ = gf.extract(model)
    noise = torch.Generator().manual_seed(1)
    own = {
        name: p + 0.1 * torch.randn(4, *p.shape, generator=noise, dtype=p.dtype)
        for name, p in params.items()
    }
    expected = []
    for m in range(4):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(own[name][m])
        model.zero_grad()
        F.cross_entropy(model(x[2 * m : 2 * m + 2]), y[2 * m : 2 * m + 2]).backward()
        expected.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert max(row["0.weight"].abs().max() for row in expected) == 0.01  # the hook has an effect

    grads_of = gf.microbatch_grads(
        gf.model_loss(model, F.cross_entropy), 4, plan=plan, chunk_size=chunk
    )
    rows = grads_of(params, (x, y)).at_rows(own).stacked()
    for name, found in rows.items():
        torch.testing.assert_close(found, torch.stack([row[name] for row in expected]))
