"""Linear layers on inputs of any number of dimensions, and matrix products without a layer."""

import torch
import torch.nn.functional as F
from torch import nn

from _zoo_case import Case, Net, buffered, inputs, parameter


def mlp(width=6, bias=True, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(width, 7, bias=bias), activation(), nn.Linear(7, 5, bias=bias))


def of_a_constant():
    """Build a layer whose input is constant: its gradient comes from its output alone."""
    run = lambda net, x: net.out(x * net.bias_of(net.grid).sum(0))
    net = Net(run, bias_of=mlp(3), out=nn.Linear(5, 4))
    return buffered(net, grid=torch.randn(6, 3))


def of_a_vector():
    run = lambda net, x: net.out(x + net.inner(net.vector))
    return Net(run, inner=nn.Linear(3, 5), out=nn.Linear(5, 4), vector=parameter(3))


def per_sample_weights():
    """Build a layer whose weight is computed from the sample."""

    def run(net, x):
        weight = net.make(x).unflatten(1, (4, 6))
        return torch.bmm(weight, x[:, :, None])[:, :, 0] + net.out(x)

    return Net(run, make=nn.Linear(6, 24), out=nn.Linear(6, 4))


def einsum():
    run = lambda net, x: torch.einsum("nth,ho->nto", torch.einsum("nti,hi->nth", x, net.a), net.b)
    return Net(run, a=parameter(7, 6), b=parameter(7, 5))


def mixer():
    """Build linear layers along either axis, so that inputs are not contiguous."""

    def run(net, x):
        x = x + net.across(x.transpose(1, 2)).transpose(1, 2)
        return x + net.along(x)

    return Net(run, across=nn.Linear(4, 4), along=nn.Linear(6, 6))


def addmm():
    run = lambda net, x: torch.addmm(net.b, x.tanh() @ net.a, net.c, beta=0.5, alpha=2.0)
    return Net(run, a=parameter(6, 7), b=parameter(5), c=parameter(7, 5))


def broadcast_input():
    """Build a layer with an expanded input of stride 0: many outputs share one row of the input."""
    run = lambda net, x: net.a(x[:, None].expand(-1, 3, -1)) * net.b
    return Net(run, a=nn.Linear(6, 5), b=parameter(3, 1))


def functional_without_bias():
    run = lambda net, x: F.linear(F.linear(x, net.a), weight=net.b, bias=net.c)
    return Net(run, a=parameter(7, 6), b=parameter(5, 7), c=parameter(5))


def bilinear():
    run = lambda net, x: net.out(net.pair(x, x.flip(1)))
    return Net(run, pair=nn.Bilinear(6, 6, 5), out=nn.Linear(5, 4))


def written_in_place():
    """Build in-place operations on the output of a layer, and on views of it."""

    def run(net, x):
        h = net.a(x).mul_(2.0)
        h[:, 0] = 0.0
        h[:, 1:].add_(1.0)
        return net.b(F.relu(h, inplace=True))

    return Net(run, a=nn.Linear(6, 7), b=nn.Linear(7, 5))


CASES = [
    Case("linear-2d", mlp, inputs(6), rules="linear"),
    Case("linear-3d", mlp, inputs(4, 6), rules="linear"),
    Case("linear-4d", mlp, inputs(2, 3, 6), rules="linear"),
    Case("linear-no-bias", lambda: mlp(bias=False), inputs(4, 6), rules="linear"),
    Case("linear-prelu", lambda: mlp(activation=nn.PReLU), inputs(6), rules="linear"),
    Case(
        "linear-in-place-relu",
        lambda: mlp(activation=lambda: nn.ReLU(inplace=True)),
        inputs(4, 6),
        rules="linear",
    ),
    Case("linear-of-a-constant", of_a_constant, inputs(5), rules="linear"),
    Case("linear-of-a-vector", of_a_vector, inputs(5), rules="linear"),
    Case("linear-expanded-input", broadcast_input, inputs(6), rules="linear"),
    Case("linear-transposed-input", mixer, inputs(4, 6), rules="linear"),
    Case("linear-functional", functional_without_bias, inputs(6), rules="linear"),
    Case("written-in-place", written_in_place, inputs(6), rules="linear"),
    Case("per-sample-weights", per_sample_weights, inputs(6), rules="linear"),
    Case("bilinear", bilinear, inputs(6), rules="linear"),
    Case("einsum", einsum, inputs(4, 6), rules="product"),
    Case("addmm", addmm, inputs(6), rules="product"),
]
