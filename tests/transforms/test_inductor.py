"""The graph that torch's compiler is given."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

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
