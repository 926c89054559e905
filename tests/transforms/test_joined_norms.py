"""Batch norms of all rows as one formula: the same training, and graphs that are left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import gradfilter as gf
from gradfilter.transforms._joined_norms import join_batch_norms

aten = torch.ops.aten
NORMS = {aten.native_batch_norm.out, aten.native_batch_norm_backward.default}


def norms_in(graph):
    return [node for node in graph.graph.nodes if node.target in NORMS]


def joined(graphs):
    """Return a backend that joins the norms, runs the graph as it is and notes it."""

    def backend(graph, *_):
        before = len(norms_in(graph))
        join_batch_norms(graph)
        graph.graph.lint()
        graph.recompile()
        graphs.append((before, len(norms_in(graph))))
        return graph

    return backend


def image_model(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


class TwiceNormed(nn.Module):
    """One BatchNorm on two tensors of a pass: its statistics are updated row by row."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.head(self.norm(y.relu()).flatten(1))


def frozen(module):
    return module.requires_grad_(False)


MODELS = {
    "affine": lambda: image_model(nn.BatchNorm2d(4, momentum=0.3)),
    "eps": lambda: image_model(nn.BatchNorm2d(4, eps=0.5)),
    "no affine": lambda: image_model(nn.BatchNorm2d(4, affine=False)),
    "no statistics": lambda: image_model(nn.BatchNorm2d(4, track_running_stats=False)),
    "frozen": lambda: image_model(frozen(nn.BatchNorm2d(4))),
    "vectors": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ),
    "first layer": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)),
    "twice": TwiceNormed,
}
ALL_JOINED = {"affine", "eps", "no affine", "no statistics", "frozen", "first layer", "twice"}


def trained(model, run, batches):
    state = run.init(copy.deepcopy(model))
    for batch in batches:
        state, _ = run(state, batch)
    return state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_trains_alike(name):
    model, rows = MODELS[name](), 3
    batches = [(torch.randn(12, 2, 6, 6), torch.randint(0, 3, (12,))) for _ in range(5)]
    update = gf.chain(gf.agree_filter(1.5), gf.sam_perturb(0.05), gf.sgd(0.1, momentum=0.9))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=rows)
    graphs = []
    found = trained(model, gf.compile(step, backend=joined(graphs)), batches)
    expected = trained(model, step, batches)
    for part in ("params", "buffers"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-11, atol=1e-12)
    (before, after), *others = graphs
    assert not others and before % rows == 0 and before > 0
    assert after == 0 or name not in ALL_JOINED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_keeps_torchs_own_kernel(dtype):
    model = image_model(nn.BatchNorm2d(4)).to(dtype)
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=2)
    graphs = []
    run = gf.compile(step, backend=joined(graphs))
    trained(model, run, [(torch.randn(8, 2, 6, 6, dtype=dtype), torch.randint(0, 3, (8,)))])
    assert (graphs[0][1] > 0) == (dtype is torch.bfloat16)


def test_one_row_is_left_as_it_is():
    model = image_model(nn.BatchNorm2d(4))
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=1)
    graphs = []
    run = gf.compile(step, backend=joined(graphs))
    trained(model, run, [(torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,)))])
    assert graphs[0][0] == graphs[0][1] > 0


def norms_of_rows(x, mean, var, order=(0, 1, 2), *, read=False):
    """Return the norms of rows, and a sum of running means in between if asked."""
    y, (means, inverses) = torch.empty_like(x), x.new_empty(2, 3, 4)
    between = torch.zeros(())
    for m in order:
        results = {"out": y[m], "save_mean": means[m], "save_invstd": inverses[m]}
        aten.native_batch_norm.out(x[m], None, None, mean, var, True, 0.1, 1e-5, **results)
        if read:
            between = between + mean.sum()
    return y, means, inverses, mean.clone(), between


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("order", "read", "join"),
    [((0, 1, 2), False, True), ((0, 1, 2), True, False), ((1, 0, 2), False, False)],
    ids=["rows in order", "read in between", "another order"],
)
def test_only_rows_in_order_that_nothing_reads_in_between_are_joined(order, read, join):
    def function(x, mean, var):
        return norms_of_rows(x, mean, var, order, read=read)

    x = torch.randn(3, 2, 4, 5, 5)
    given = lambda: (x, torch.zeros(4), torch.ones(4))
    graph = make_fx(function, tracing_mode="fake")(*given())
    join_batch_norms(graph)
    graph.graph.lint()
    graph.recompile()
    assert bool(norms_in(graph)) != join
    torch.testing.assert_close(graph(*given()), function(*given()), rtol=1e-12, atol=1e-13)
