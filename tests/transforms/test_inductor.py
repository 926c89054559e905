"""The graph that torch's compiler is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import gradfilter as gf
from gradfilter.transforms._inductor import by_inductor

aten = torch.ops.aten


def traced(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


SUMS = {
    "sum, product": lambda m, a, b: m * 0.9 + a @ b,
    "product, sum": lambda m, a, b: a @ b + m * 0.9,
    "seen in another shape": lambda m, a, b: m.view(-1) * 0.9 + (a @ b).view(-1),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_with_a_product_is_not_joined_and_keeps_its_bits(name):
    args = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    expected = SUMS[name](*args)
    graph = traced(SUMS[name], *args)
    by_inductor(graph)  # compiles at the first call only
    assert aten.add.Tensor not in targets(graph) and aten.sub.Tensor in targets(graph)
    assert torch.equal(graph(*args), expected)


OTHERS = {
    "a bias": lambda m, a, b: m[0] + a @ b,
    "a factor": lambda m, a, b: torch.add(m, a @ b, alpha=2.0),
    "no product": lambda m, a, b: m + m * 2,
    "a number": lambda m, a, b: a @ b + 1.0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name):
    args = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    graph = traced(OTHERS[name], *args)
    before = targets(graph)
    by_inductor(graph)
    assert targets(graph) == before


def test_a_norm_that_writes_its_results_returns_them_first():
    x, mean, var = torch.randn(2, 4, 3, 5, 5), torch.zeros(3), torch.ones(3)

    def norms(x, mean, var):
        y, means, inverses = torch.empty_like(x), x.new_empty(2, 3), x.new_empty(2, 3)
        for m in range(2):
            out = (y[m], means[m], inverses[m])
            torch.native_batch_norm(x[m], None, None, mean, var, True, 0.1, 1e-5, out=out)
        return y, means, inverses, mean.clone(), var.clone()

    graph = traced(norms, x, mean, var)
    assert aten.native_batch_norm.out in targets(graph)
    by_inductor(graph)
    assert aten.native_batch_norm.out not in targets(graph)
    expected = norms(x, mean.clone(), var.clone())
    found = graph(x, mean.clone(), var.clone())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_batch_norm_of_pictures_is_compiled():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(4 * 36, 3))
    batch = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    chain = gf.chain(gf.agree_filter(1.9), gf.sam_perturb(0.1), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), chain, microbatches=2)
    compiled = gf.compile(step)
    state = own = step.init(model)
    for _ in range(3):
        state, _ = step(state, batch)
        own, _ = compiled(own, batch)
    for part in ("params", "buffers"):
        torch.testing.assert_close(own[part], state[part], rtol=1e-11, atol=1e-12)
