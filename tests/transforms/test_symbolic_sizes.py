"""Compiled steps whose graph holds for several sizes of the batch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _formulas import formulas
from gradfilter import _tree

FLOAT = torch.float64


def vectors(n, d=5):
    return torch.randn(n, d, dtype=FLOAT), torch.randint(3, (n,))


def pictures(n):
    return torch.randn(n, 2, 8, 8, dtype=FLOAT), torch.randint(3, (n,))


def texts(length):
    return torch.randint(20, (8, length)), torch.randint(3, (8,))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)).mean(1))


def mlp(*more):
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), *more, nn.Linear(8, 3)).to(FLOAT)


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).to(FLOAT)


AGREE = gf.chain(gf.agree_filter(0.5), gf.sgd(0.1, momentum=0.9))
CLIP = gf.chain(gf.clip_per_row(0.1), gf.mean_rows(), gf.adam(0.01))
SAM = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1))
CASES = {
    "perceptron": (mlp, AGREE, 4, vectors, (24, 48, 40)),
    "dropout": (lambda: mlp(nn.Dropout(0.4)), AGREE, 4, vectors, (24, 48, 40)),
    "clip": (mlp, CLIP, 4, vectors, (24, 8, 40)),
    "SAM": (mlp, SAM, 2, vectors, (24, 40, 8)),
    "BatchNorm": (conv, AGREE, 4, pictures, (24, 48)),
    "lengths of texts": (lambda: Text().to(FLOAT), AGREE, 4, texts, (5, 9)),
}


SHARED = ("perceptron", "dropout", "clip", "SAM")


def traces(compiled):
    return sum(map(len, compiled.graphs.entries.values()))


def assert_trains_alike(step, compiled, model, batches):
    """Train by both from one state, and compare every number of states and losses by its bits."""
    expected = own = step.init(model, seed=1)
    for batch in batches:
        with formulas():
            expected, info = step(expected, batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trace number")
            own, found = compiled(own, batch)
        assert torch.equal(found["loss"], info["loss"])
        for new, old in zip(_tree.leaves(own), _tree.leaves(expected), strict=True):
            assert torch.equal(new, old)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_for_many_sizes_gives_the_steps_of_each(case):
    torch.manual_seed(0)
    build, update, microbatches, batch_of, sizes = CASES[case]
    model = build()
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, update, microbatches=microbatches)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    assert_trains_alike(step, compiled, model, map(batch_of, (*sizes, sizes[0])))
    assert traces(compiled) <= len(sizes)
    if case in SHARED:  # others use functions without a rule for symbols
        assert traces(compiled) < len(sizes)


def test_a_size_that_decides_the_way_to_a_gradient_is_another_trace():
    model = nn.Linear(40, 30, dtype=FLOAT)
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, AGREE, microbatches=2)
    compiled = gf.compile(step, backend="graph", dynamic=True)

    def modes(n):
        batch = torch.randn(n, 40, dtype=FLOAT), torch.randint(3, (n,))
        rows = step.grads_of(gf.extract(model)[0], batch)
        return [layer.mode for layer in rows.layers], batch

    seen = {}
    for n in (8, 10, 600, 640):
        mode, batch = modes(n)
        state = step.init(model)
        with formulas():
            expected, _ = step(state, batch)
        found, _ = compiled(state, batch)
        for name, p in expected["params"].items():
            torch.testing.assert_close(found["params"][name], p, rtol=1e-12, atol=1e-12)
        seen[tuple(mode)] = traces(compiled)
    assert list(seen.values()) == [1, 2]  # ghost products, then stored rows


@pytest.mark.parametrize("of", ["a number", "feature dropout", "one row per sample"])
def test_what_needs_fixed_sizes_is_traced_for_each(of):
    """A number read from a size, a function without a rule for symbols, the number of rows."""
    model = (
        mlp(nn.Unflatten(1, (8, 1)), nn.Dropout1d(0.4), nn.Flatten())
        if of == "feature dropout"
        else mlp()
    )

    def criterion(output, target):
        loss = F.cross_entropy(output, target)
        return loss / int(output.shape[0]) if of == "a number" else loss

    rows = None if of == "one row per sample" else 4
    step = gf.train_step(gf.model_loss(model, criterion), AGREE, microbatches=rows)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    assert_trains_alike(step, compiled, model, map(vectors, (24, 48, 24)))
    assert traces(compiled) == 2


def test_other_layouts_of_a_batch():
    step = gf.train_step(gf.model_loss(mlp(), F.cross_entropy), AGREE, microbatches=4)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    state = step.init(mlp())
    x, y = vectors(64)
    batches = {
        "whole": (x[:32], y[:32]),
        "a later part": (x[16:], y[16:]),  # begins elsewhere in memory: the same trace
        "a transposed table": (x[:24].T.contiguous().T, y[:24]),
        "another batch": vectors(24),
    }
    counts = []
    for batch in batches.values():
        with formulas():
            expected, _ = step(state, batch)
        found, _ = compiled(state, batch)
        for name, p in expected["params"].items():
            assert torch.equal(found["params"][name], p)
        counts.append(traces(compiled))
    assert counts == [1, 1, 2, 2]


def test_one_sample_per_row_and_an_axis_of_one():
    """The sizes 0 and 1 are no symbols: a trace for them holds for them alone."""
    step = gf.train_step(gf.model_loss(mlp(), F.cross_entropy), AGREE, microbatches=4)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    state = step.init(mlp())
    for n in (4, 8, 12, 4):
        batch = vectors(n)
        with formulas():
            expected, _ = step(state, batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trace number")
            found, _ = compiled(state, batch)
        for name, p in expected["params"].items():
            assert torch.equal(found["params"][name], p)
    assert traces(compiled) <= 3


def test_a_number_of_samples_that_does_not_divide_is_the_usual_error():
    step = gf.train_step(gf.model_loss(mlp(), F.cross_entropy), AGREE, microbatches=4)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    state = step.init(mlp())
    compiled(state, vectors(24))
    with pytest.raises(ValueError, match="microbatches"):
        compiled(state, vectors(25))
