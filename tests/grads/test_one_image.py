"""BatchNorm of one image in every memory format: rows are right where the CPU kernel is not.

A plain backward pass is not a reference here: its gradients are off by more than their own norm.
The references are the formula, and finite differences of the plain loss, whose forward pass is
right.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import off, plain_rows, side_by_side
from _zoo_case import PLAN, Net, inputs, rows_of

pytestmark = pytest.mark.usefixtures("float64")
SIDES = {4: (5, 3), 5: (2, 3, 2)}


def tokens(x):
    """(B, positions, C), as attention takes an image."""
    return x.flatten(2).transpose(1, 2).contiguous()


def image(t, sides):
    return t.transpose(1, 2).unflatten(2, sides)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


BEFORE = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "from tokens": lambda x: image(tokens(x), x.shape[2:]),
}
AFTER = {
    "contiguous": lambda y: y.sin(),
    "channels last": lambda y: (y.movedim(1, -1).sin() * torch.arange(1.0, 5)).movedim(-1, 1),
    "to tokens": lambda y: y.flatten(2).transpose(1, 2) @ torch.ones(4, 4).tril() + 1,
}
MEAN, VAR = torch.linspace(-1, 1, 4).double(), torch.linspace(1, 2, 4).double()


def by_formula(x, p, mean=None, var=None):
    over, along = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    mean = x.mean(over, keepdim=True) if mean is None else mean.view(along)
    var = x.var(over, keepdim=True, correction=0) if var is None else var.view(along)
    return (x - mean) * (var + 1e-5).rsqrt() * p["w"].view(along) + p["b"].view(along)


NORMS = {
    "batch_norm": lambda x, p: F.batch_norm(x, None, None, p["w"], p["b"], True),
    "evaluation": lambda x, p: F.batch_norm(x, MEAN, VAR, p["w"], p["b"]),
    "instance_norm": lambda x, p: F.instance_norm(x, None, None, p["w"], p["b"]),
    "torch.batch_norm": lambda x, p: torch.batch_norm(
        x, p["w"], p["b"], None, None, True, 0.1, 1e-5, False
    ),
    "native": lambda x, p: torch.native_batch_norm(x, p["w"], p["b"], None, None, True, 0.1, 1e-5)[
        0
    ],
}


def loss_of(before, norm, after):
    def loss(p, batch):
        x = batch[0] * p["s"].view(1, -1, *[1] * (batch[0].ndim - 2))
        y = AFTER[after](norm(BEFORE[before](x), p)).flatten()
        return (y * torch.cos(1.3 * torch.arange(len(y)))).sum()

    return loss


def case(rank=4):
    torch.manual_seed(2)
    return {n: torch.rand(4) + 0.5 for n in "swb"}, (torch.randn(3, 4, *SIDES[rank]),)


@pytest.mark.parametrize("rank", SIDES)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("before", "after"), [*itertools.product(BEFORE, AFTER)])
def test_rows_of_one_image_are_right_in_every_layout(name, before, after, rank):
    params, batch = case(rank)
    loss = loss_of(before, NORMS[name], after)
    given = (MEAN, VAR) if name == "evaluation" else ()
    truth = loss_of(before, lambda x, p: by_formula(x, p, *given), after)
    want = plain_rows(truth, params, batch, 3)
    for plan in ("loop", PLAN, "vmap"):
        found = gf.per_sample_grads(loss, plan=plan)(params, batch)
        assert off(side_by_side(found.stacked(), params), want) < 1e-9, plan
    single = gf.per_sample_grads(loss)(params, (batch[0][:1],))
    assert off(side_by_side(single.stacked(), params), want[:1]) < 1e-9


@pytest.mark.parametrize(("before", "after"), [*itertools.product(BEFORE, AFTER)])
def test_they_are_the_finite_differences_of_the_plain_loss(before, after):
    params, batch = case()
    loss, h = loss_of(before, NORMS["batch_norm"], after), 1e-6
    rows = side_by_side(gf.per_sample_grads(loss, plan="loop")(params, batch).stacked(), params)
    flat = torch.cat([params[n] for n in "swb"])
    at = lambda p, x: loss(dict(zip("swb", p.split(4), strict=True)), (x,))
    for row, x in zip(rows, batch[0].split(1), strict=True):
        steps = [h * e for e in torch.eye(12)]
        want = torch.stack([(at(flat + e, x) - at(flat - e, x)) / (2 * h) for e in steps])
        assert off(row, want) < 1e-6


def test_an_image_of_tokens_in_a_module():
    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.norm(image(self.mix(tokens(x)), x.shape[2:]))
            return self.out(y.flatten(2).transpose(1, 2)).mean(1)

    model, (x,) = Hybrid(), case()[1]
    batch = x, torch.tensor([0, 1, 1])
    loop, fused = (
        rows_of(model, batch, plan, criterion=F.cross_entropy) for plan in ("loop", PLAN)
    )
    assert off(fused.gram(), loop.gram()) < 1e-9

    def plain(p, b):
        h = image(F.linear(tokens(b[0]), p["mix.weight"], p["mix.bias"]), b[0].shape[2:])
        y = by_formula(h, {"w": p["norm.weight"], "b": p["norm.bias"]})
        out = F.linear(y.flatten(2).transpose(1, 2), p["out.weight"], p["out.bias"])
        return F.cross_entropy(out.mean(1), b[1])

    params, _ = gf.extract(model)
    want = plain_rows(plain, params, batch, 3)
    assert off(side_by_side(loop.stacked(), params), want) < 1e-9


def test_naming_a_memory_format_is_no_reason_to_loop():
    def run(net, x):
        x = net.conv(x.to(memory_format=torch.channels_last))
        return x.contiguous(memory_format=torch.channels_last).clone(
            memory_format=torch.preserve_format
        )

    model, batch = Net(run, conv=nn.Conv2d(4, 3, 2)), inputs(4, 5, 5)(6)
    loop, fused = (rows_of(model, batch, plan) for plan in ("loop", PLAN))
    assert off(fused.gram(), loop.gram()) < 1e-12
