"""Unusual parameters: shared, bare, frozen, unused, computed from others."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from _zoo_case import Case, Net, frozen, inputs, parameter


def twice():
    """Build a module that is used twice, also by its weight alone, with an unused parameter."""

    def run(net, x):
        h = net.a(net.a(x).tanh())
        h = h @ net.a.weight.t() + F.linear(h, net.a.weight[:, :])
        return net.out(h)

    return Net(run, a=nn.Linear(6, 6), out=nn.Linear(6, 3), unused=parameter(3))


def two_names():
    layer = nn.Linear(6, 6)
    run = lambda net, x: net.out(net.second(net.first(x).tanh()))
    return Net(run, first=layer, second=layer, out=nn.Linear(6, 3))


def tied_transposed():
    """Build an autoencoder whose decoder is its transposed first weight."""
    run = lambda net, x: F.linear(net.a(x).tanh(), net.a.weight.t(), net.bias)
    return Net(run, a=nn.Linear(6, 4), bias=parameter(6))


def split_weight():
    """Build a model with one weight cut into three, each part in its own product."""

    def run(net, x):
        a, b, c = net.qkv.chunk(3)
        return F.linear(x, a).sigmoid() * F.linear(x, b, net.bias[:4]) + F.linear(x, c).tanh()

    return Net(run, qkv=parameter(12, 6), bias=parameter(8))


def token_and_scale():
    """Build a model with a class token, a position embedding, and a scale of shape ()."""

    def run(net, x):
        x = torch.cat([net.cls.expand(len(x), -1, -1), x], 1) + net.place
        return net.out((x * net.scale).tanh()) * net.temperature.exp()

    return Net(
        run,
        cls=parameter(1, 1, 6),
        place=parameter(1, 5, 6),
        scale=parameter(6),
        temperature=parameter(),
        out=nn.Linear(6, 3),
    )


def blocks(*prefixes):
    """Build three layers with some of their parameters frozen."""
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return frozen(nn.Sequential(*layers), *prefixes)


def low_rank_weight():
    """Build LoRA as a change of weight."""
    run = lambda net, x: net.out(F.linear(x, net.w + net.a @ net.b).tanh())
    net = Net(run, w=parameter(6, 6), a=parameter(6, 2), b=parameter(2, 6), out=nn.Linear(6, 3))
    return frozen(net, "w", "out")


def low_rank_adapter():
    """Build LoRA as a second path next to a frozen layer."""
    run = lambda net, x: net.out((net.base(x) + 2.0 * net.up(net.down(x))).tanh())
    net = Net(
        run,
        base=nn.Linear(6, 6),
        down=nn.Linear(6, 2, bias=False),
        up=nn.Linear(2, 6, bias=False),
        out=nn.Linear(6, 3),
    )
    return frozen(net, "base", "out")


def normed_weights():
    return nn.Sequential(
        *(weight_norm(nn.Conv2d(3, 4, 2)), nn.ReLU(inplace=True), nn.Flatten()),
        weight_norm(nn.Linear(64, 5)),
    )


def checkpointed():
    run = lambda net, x: net.out(checkpoint(net.block, net.a(x), use_reentrant=False))
    block = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
    return Net(run, a=nn.Linear(6, 6), block=block, out=nn.Linear(6, 3))


def experts():
    """Build a soft mixture of experts with all parameters in two tensors."""

    def run(net, x):
        gate = net.gate(x).softmax(-1)
        h = torch.einsum("ni,eih->neh", x, net.first).relu()
        return torch.einsum("ne,neh,eho->no", gate, h, net.second)

    return Net(run, gate=nn.Linear(6, 3), first=parameter(3, 6, 4), second=parameter(3, 4, 5))


def squeezed():
    """Build squeeze and excitation, layer scale, and a residual path that is a view."""

    def run(net, x):
        h = net.conv(x)
        gate = net.up(net.down(h.mean((2, 3))).relu()).sigmoid()
        return x + net.scale[:, None, None] * h * gate[..., None, None]

    return Net(
        run,
        conv=nn.Conv2d(4, 4, 3, padding=1),
        down=nn.Linear(4, 2),
        up=nn.Linear(2, 4),
        scale=parameter(4),
    )


ROWS, SETS, MAPS = inputs(6), inputs(4, 6), inputs(3, 5, 5)

CASES = [
    Case("used-twice", twice, SETS, rules="linear"),
    Case("two-names", two_names, ROWS, rules="linear"),
    Case("tied-transposed", tied_transposed, ROWS, rules="linear"),
    Case("weight-split", split_weight, SETS),
    Case("token-and-scale", token_and_scale, SETS, rules="linear"),
    Case("frozen-weights", lambda: blocks("0.weight", "4.weight"), ROWS, rules="linear"),
    Case("frozen-biases", lambda: blocks("0.bias", "2.bias"), ROWS, rules="linear"),
    Case("frozen-first-blocks", lambda: blocks("0", "2"), ROWS, rules="linear"),
    Case("frozen-last-block", lambda: blocks("4"), ROWS, rules="linear"),
    Case("lora-weight", low_rank_weight, SETS),
    Case("lora-adapter", low_rank_adapter, SETS, rules="linear"),
    Case("weight-norm", normed_weights, MAPS),
    Case("spectral-norm-eval", lambda: spectral_norm(nn.Linear(6, 4)).eval(), ROWS),
    Case("orthogonal", lambda: orthogonal(nn.Linear(6, 4)), ROWS, may_refuse="orthogonal|linalg"),
    Case("checkpointed", checkpointed, ROWS, rules="linear"),
    Case("experts", experts, ROWS, rules="linear"),
    Case("squeeze-excite", squeezed, inputs(4, 5, 5), rules="conv linear"),
]
