"""The graph of a traced step: clean, without constants from outside, with draws that repeat."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from gradfilter.transforms._trace import trace

aten = torch.ops.aten


def graph_of(step, model, batch):
    seen = []
    compiled = gf.compile(step, backend=lambda graph: seen.append(graph) or graph)
    compiled(compiled.init(model, seed=0), batch)
    return seen[0]


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def net():
    layers = nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.Linear(8, 3))


def step_of(model, *more):
    update = gf.chain(gf.agree_filter(1.5), *more, gf.sgd(0.1, momentum=0.9))
    return gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=4)


def batch():
    return torch.randn(8, 6), torch.randint(3, (8,))


def test_it_is_clean():
    graph = graph_of(step_of(model := net()), model, batch())
    found = targets(graph)
    assert aten.alias.default not in found and aten.detach.default not in found
    views = [
        (node.target, node.args)
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target in (aten.view.default, aten.select.int)
    ]
    keys = [(target, str(args)) for target, args in views]
    assert len(keys) == len(set(keys)) > 3
    unused = [node for node in graph.graph.nodes if node.op == "call_function" and not node.users]
    assert all(node.target._schema.is_mutable for node in unused)


def test_frozen_parameters_are_inputs():
    model = net()
    graph = graph_of(step_of(model), model, batch())
    assert [node for node in graph.graph.nodes if node.op == "get_attr"] == []
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # 4 parameters, their momentum, the counter, x, y, and 2 frozen parameters
    assert len(inputs) >= 4 + 4 + 2 + 2
    assert sum(node.name.startswith("outside") for node in inputs) == 2


def test_a_frozen_parameter_is_one_input_however_often_it_is_used():
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3))
    model.insert(1, model[0])
    graph = graph_of(step_of(model), model, batch())
    outside = [node for node in graph.graph.nodes if node.name.startswith("outside")]
    assert len(outside) == 2


class NormedTwice(nn.Module):
    """The statistics are computed again at the end of a pass, by an operation without a result."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.norm(x).tanh()))


class NormedForTheStatistics(nn.Module):
    """Nothing uses the result of the norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        self.norm(x)
        return self.head(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("backend", ["graph", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
@pytest.mark.parametrize("build", [NormedTwice, NormedForTheStatistics])
def test_running_statistics_are_updated_though_no_schema_says_so(build, plan, backend):
    model = build()
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, update, microbatches=4, plan=plan)
    compiled = gf.compile(step, backend=backend)
    state, norm = compiled.init(model), copy.deepcopy(model)
    for _ in range(2):
        inputs, classes = batch()
        state, _ = compiled(state, (inputs, classes))
        for row in inputs.chunk(4):
            norm(row)
        for name, parameter in norm.named_parameters():
            parameter.data.copy_(state["params"][name])
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        expected = norm.state_dict()[name]
        torch.testing.assert_close(state["buffers"][name], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("more", [(), (gf.sam_perturb(0.05),)])
def test_a_second_pass_draws_nothing_new(more):
    model = net()
    found = targets(graph_of(step_of(model, *more), model, batch()))
    assert sum("bernoulli" in str(target) for target in found) == 1


def test_constants_of_the_step_stay_in_the_graph():
    def run(tree):
        x = tree["x"]
        return {"y": x * torch.tensor([1.0, 2.0]) + outside}, {"draws": 0}

    outside = torch.ones(2)
    found = trace(run, {"x": torch.zeros(2)}, ())
    assert len(found.outside) == 1 and found.outside[0]() is outside
    outside.add_(1)  # in place: the graph reads the tensor itself
    (y,) = found.graph(torch.ones(2), found.outside[0]())
    assert y.tolist() == [3.0, 4.0] and not found.calls


def test_python_values_are_constants():
    found = trace(
        lambda tree: ({"y": tree["x"] * tree["n"]}, {"draws": 0}), {"x": torch.ones(2), "n": 3}, ()
    )
    assert found.graph(torch.ones(2))[0].tolist() == [3.0, 3.0]
    assert found.result([torch.ones(())], []) == {"y": torch.ones(())}


def test_a_repeated_pass_that_draws_more_is_refused():
    def run(tree):
        return {"y": torch.rand(2) + tree["x"]}, {"draws": 0}

    with pytest.raises(RuntimeError, match="draws more random numbers than the first"):
        trace(run, {"x": torch.ones(2)}, ())
