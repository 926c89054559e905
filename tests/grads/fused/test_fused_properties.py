"""Layers of random shapes and options under plan "fused": the answers are those of the loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _zoo_case import PLAN, token_loss, wavy
from _zoo_check import Oracle, probe_for

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

rows = st.tuples(st.integers(1, 4), st.integers(1, 3))  # M, B
small = st.integers(1, 3)
often = settings(max_examples=25)


def assert_as_the_loop(model, batch, m, criterion=wavy):
    """Losses, buffers and the four questions; M = N, B = 1 is a legal batch."""
    torch.set_default_dtype(torch.float64)
    loss = gf.model_loss(model, criterion)
    params, buffers = gf.extract(model)
    of = lambda plan: gf.microbatch_grads(loss, m, plan=plan)(params, batch, buffers=buffers)
    oracle = Oracle(of("loop"), probe_for(params, m))
    for order in (("gram", "combine", "stacked"), ("sq_norms", "dot", "combine without a row")):
        fused = of(PLAN)
        oracle.check_pass(fused, "")
        for question in order:
            oracle.check(fused, question, " -> ".join(order))


def batch_of(n, *shape):
    return torch.randn(n, *shape), torch.randint(0, 5, (n,))


@st.composite
def convolutions(draw, transposed):
    """A convolution of one to three dimensions, and an input it fits."""
    dims, groups = draw(st.integers(1, 3)), draw(small)
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        # An output padding is legal below the stride or the dilation.
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, top)) for top in limits)
        options["padding"] = tuple(min(k // 2, draw(st.integers(0, 1))) for k in kernel)
        reach = [1] * dims
    else:
        same = set(stride) == {1} and draw(st.booleans())
        options["padding"] = "same" if same else draw(st.sampled_from([each(0, 1), "valid"]))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = tuple(draw(st.integers(max(r, 2), r + 4)) for r in reach)
    kinds = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    inside, outside = groups * draw(small), groups * draw(small)
    torch.set_default_dtype(torch.float64)
    layer = kinds[transposed][dims - 1](inside, outside, kernel, **options)
    return layer, (inside, *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@settings(max_examples=80)
@given(data=st.data(), rows=rows)
def test_convolutions(transposed, data, rows):
    layer, shape = data.draw(convolutions(transposed))
    m, b = rows
    assert_as_the_loop(nn.Sequential(layer, nn.Tanh()), batch_of(m * b, *shape), m)


@often
@given(rows=rows, shape=st.lists(small, max_size=3), sizes=st.tuples(small, small), bias=...)
def test_linear_on_inputs_of_any_rank(rows, shape, sizes, bias: bool):
    torch.set_default_dtype(torch.float64)
    (m, b), (width, out) = rows, sizes
    model = nn.Sequential(nn.Linear(width, out, bias=bias), nn.Tanh(), nn.Linear(out, 2))
    assert_as_the_loop(model, batch_of(m * b, *shape, width), m)


@often
@given(
    rows=rows,
    length=st.integers(1, 5),
    vocabulary=st.integers(2, 6),
    padding=st.none() | st.integers(0, 1),
    scale=st.booleans(),
)
def test_embeddings(rows, length, vocabulary, padding, scale):
    torch.set_default_dtype(torch.float64)
    m, b = rows
    embed = nn.Embedding(vocabulary, 3, padding_idx=padding, scale_grad_by_freq=scale)
    ids, labels = (torch.randint(0, vocabulary, (m * b, length)) for _ in range(2))
    model = nn.Sequential(embed, nn.Tanh(), nn.Linear(3, vocabulary))
    assert_as_the_loop(model, (ids, labels), m, token_loss)


def norms(channels, groups, affine, size):
    return {
        "layer": nn.LayerNorm((channels, *size), elementwise_affine=affine),
        "last": nn.LayerNorm(size[-1], elementwise_affine=affine, bias=False),
        "group": nn.GroupNorm(groups, channels, affine=affine),
        "instance": nn.InstanceNorm2d(channels, affine=affine),
        "rms": nn.RMSNorm((channels, *size), elementwise_affine=affine),
        "batch": nn.BatchNorm2d(channels, affine=affine),
        "batch in evaluation": nn.BatchNorm2d(channels, affine=affine).eval(),
    }


@pytest.mark.parametrize("kind", norms(2, 1, True, (2, 2)))
@settings(max_examples=12)
@given(
    rows=rows,
    groups=small,
    per_group=small,
    affine=...,
    size=st.tuples(st.integers(2, 4), st.integers(2, 3)),
)
def test_norms(kind, rows, groups, per_group, affine: bool, size):
    torch.set_default_dtype(torch.float64)
    (m, b), channels = rows, groups * per_group
    first, last = nn.Conv2d(2, channels, 1), nn.Conv2d(channels, 2, 1)
    model = nn.Sequential(first, norms(channels, groups, affine, size)[kind], nn.Tanh(), last)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert_as_the_loop(model, batch_of(m * b, 2, *size), m)


@often
@given(rows=rows, length=st.integers(1, 4), heads=small, causal=..., masked=...)
def test_attention(rows, length, heads, causal: bool, masked: bool):
    torch.set_default_dtype(torch.float64)
    m, b = rows

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(3, 6 * heads)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, 2)).permute(2, 0, 3, 1, 4)
            there = (x[:, :, 0] > 0) | (torch.arange(length) == 0)
            mask = there[:, None, None] if masked and not causal else None
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    assert_as_the_loop(Attention(), batch_of(m * b, length, 3), m)


@settings(max_examples=12)
@given(
    rows=rows,
    length=st.integers(1, 4),
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 2),
    both=...,
    bias=...,
)
def test_recurrent_networks(rows, length, kind, layers, both: bool, bias: bool):
    torch.set_default_dtype(torch.float64)
    m, b = rows
    options = {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": True}

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(2, 3, **options)

        def forward(self, x):
            return self.rnn(x)[0]

    assert_as_the_loop(Recurrent(), batch_of(m * b, length, 2), m)
