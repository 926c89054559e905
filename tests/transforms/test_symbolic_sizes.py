"""Compiled steps whose graph holds for several sizes of the batch."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def pictures(n, side=8):
    return torch.randn(n, 2, side, side, dtype=FLOAT), torch.randint(3, (n,))


def texts(n, length=6):
    return torch.randint(20, (n, length)), torch.randint(3, (n,))


class Text(nn.Module):
    """Embeddings with padding, and attention with its mask.

    Args:
        weights: True for attention that computes its weights, False for a whole layer.
    """

    def __init__(self, weights):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if weights else None
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        x, padding = self.embed(tokens), tokens == 0
        if self.attend is None:
            return self.head(self.layer(x).mean(1))
        mixed, weights = self.attend(x, x, x, key_padding_mask=padding & (tokens[:, :1] != 0))
        return self.head(mixed.mean(1)) + weights.square().mean()


def mlp(*more):
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), *more, nn.Linear(8, 3)).to(FLOAT)


def network(*more):
    """Return a network of convolutions; the layers in between get and give 4 channels."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), *more, nn.Flatten(), nn.Linear(4, 3)).to(FLOAT)


def pooled():
    return network(
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.GroupNorm(2, 4),
        nn.AvgPool2d(2),
    )


def of_any_side():
    return network(nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


AGREE = gf.chain(gf.agree_filter(0.5), gf.sgd(0.1, momentum=0.9))
FIRST = gf.chain(gf.agree_filter(0.9, against="first"), gf.sgd(0.1, momentum=0.9))
CLIP = gf.chain(gf.clip_per_row(0.1), gf.mean_rows(), gf.adam(0.01))
SAM = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1))


@dataclass(frozen=True)
class Case:
    """A step, batches of several sizes, and the number of traces that they need.

    Attributes:
        model: Builds the model.
        update: The chain.
        microbatches: M, or None for one sample per row.
        batch_of: Draws a batch of a size.
        sizes: The sizes, in order.
        traces: The number of traces after all of them.
        lately: True if torch 2.11 traces every size for itself.
    """

    model: Callable[[], nn.Module]
    update: gf.Transform
    microbatches: int | None
    batch_of: Callable[[int], Any]
    sizes: tuple[int, ...]
    traces: int
    lately: bool = False


# Samples in a ragged last batch, and one sample in a row, a text of one token: 1 is no symbol.
CASES = {
    "perceptron": Case(mlp, AGREE, 4, vectors, (24, 48, 40), 1),
    "dropout": Case(lambda: mlp(nn.Dropout(0.4)), AGREE, 4, vectors, (24, 48, 40), 1),
    "norms": Case(
        lambda: mlp(nn.BatchNorm1d(8), nn.LayerNorm(8), nn.RMSNorm(8)),
        CLIP,
        4,
        vectors,
        (24, 48, 40),
        1,
    ),
    "SAM": Case(
        lambda: network(nn.BatchNorm2d(4), nn.AdaptiveMaxPool2d(1)),
        SAM,
        2,
        pictures,
        (24, 40, 22),
        1,
    ),
    "convolutions": Case(pooled, AGREE, 4, pictures, (48, 64, 52, 4), 2),
    "sides of pictures": Case(of_any_side, CLIP, 4, partial(pictures, 8), (9, 12, 10), 1),
    # The second size has a Gram in two blocks, which is another trace.
    "texts": Case(lambda: Text(False).to(FLOAT), AGREE, 4, texts, (24, 40, 28), 2),
    "lengths of texts": Case(
        lambda: Text(True).to(FLOAT), AGREE, 4, partial(texts, 8), (5, 9, 7, 1), 2, lately=True
    ),
    "rows": Case(lambda: mlp(nn.Dropout(0.4)), CLIP, None, vectors, (24, 48, 41, 1), 2),
    "rows of pictures": Case(of_any_side, FIRST, None, pictures, (24, 48, 41), 1),
    "rows of texts": Case(
        lambda: Text(False).to(FLOAT), CLIP, None, texts, (24, 48, 41), 1, lately=True
    ),
}


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


EVERY_DAY = ("perceptron", "rows", "SAM")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in EVERY_DAY))
        for name, case in CASES.items()
    ],
)
def test_a_graph_for_many_sizes_gives_the_steps_of_each(case):
    torch.manual_seed(0)
    model = case.model()
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, case.update, microbatches=case.microbatches)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    # The first two sizes again, so that a trace that holds for them alone would be counted.
    assert_trains_alike(step, compiled, model, map(case.batch_of, (*case.sizes, *case.sizes[:2])))
    fixed = case.lately and torch.__version__ < "2.12"
    assert traces(compiled) == (len(case.sizes) if fixed else case.traces)


def test_slices_of_a_data_set_share_a_graph():
    model, (x, y) = mlp(), vectors(400)
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), CLIP, microbatches=4)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    places = (16, 64), (64, 112), (112, 152), (0, 48)  # the first one does not begin at 0
    batches = [(x[start:stop], y[start:stop]) for start, stop in places]
    assert_trains_alike(step, compiled, model, batches)
    assert traces(compiled) == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("of", ["a number", "feature dropout", "rows in order"])
def test_what_needs_fixed_sizes_is_traced_for_each(of):
    """A number read from a size, a function without a rule for symbols, rows one by one."""
    model = (
        mlp(nn.Unflatten(1, (8, 1)), nn.Dropout1d(0.4), nn.Flatten())
        if of == "feature dropout"
        else mlp()
    )

    def criterion(output, target):
        loss = F.cross_entropy(output, target)
        return loss / int(output.shape[0]) if of == "a number" else loss

    rows = None if of == "rows in order" else 4
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
