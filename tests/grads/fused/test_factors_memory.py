"""The memory that factors take to answer, and their answers against the rows."""

import pytest
import torch
from torch import nn

import gradfilter as gf
from _allocations import Peak
from _plain import off
from gradfilter.grads.fused import _conv_factor
from gradfilter.grads.fused import _factors as _factor
from gradfilter.grads.fused._conv_factor import ConvFactor
from gradfilter.grads.fused._conv_geometry import Geometry
from gradfilter.grads.fused._factors import EmbeddingFactor, OuterFactor, TiledFactor

BLOCK = 2**18


def outer(m, n, p, d):
    return OuterFactor(torch.randn(m, n, d), torch.randn(m, n, p), torch.Size((p, d)))


def embedding(m, n, units, width):
    index = torch.randint(0, units, (m, n))
    return EmbeddingFactor(index, torch.randn(m, n, width), torch.Size((units, width)))


def conv(m, b, fan_in, fan_out, side, groups=1, transposed=False):
    sizes = (1, 1), (1, 1), (1, 1), transposed, (0, 0), groups
    shape = (fan_in, fan_out // groups) if transposed else (fan_out, fan_in // groups)
    x, y = torch.randn(m, b, fan_in, side, side), torch.randn(m, b, fan_out, side, side)
    return ConvFactor(x, y, torch.randn(*shape, 3, 3), Geometry(2, *sizes))


FACTORS = {
    "many tokens, small table": lambda: embedding(2, 1024, 50, 8),
    "many tokens, large table": lambda: embedding(3, 700, 4000, 16),
    "few tokens, many rows": lambda: embedding(200, 6, 500, 16),
    "wide tokens": lambda: embedding(4, 60, 500, 64),
    "one position": lambda: outer(256, 1, 64, 64),
    "many positions": lambda: outer(2, 1024, 16, 16),
    "many rows": lambda: outer(256, 6, 48, 48),
    "large maps": lambda: conv(4, 4, 4, 6, 12),
    "small maps": lambda: conv(24, 1, 24, 24, 4),
    "small maps, many rows": lambda: conv(150, 1, 8, 32, 3),
    "groups": lambda: conv(6, 2, 8, 8, 5, groups=4),
    "rows far larger than maps": lambda: conv(64, 1, 32, 32, 2, transposed=True),
    "transposed": lambda: conv(24, 1, 24, 24, 4, transposed=True),
}
QUESTIONS = {
    "gram": lambda f: f.gram(),
    "sq_norms": lambda f: f.sq_norms(),
    "gram in tiles": lambda f: TiledFactor([f]).gram(),
    "sq_norms in tiles": lambda f: TiledFactor([f]).sq_norms(),
    "gram of two uses": lambda f: TiledFactor([f, f]).gram(),
    "sq_norms of two uses": lambda f: TiledFactor([f, f]).sq_norms(),
    "total": lambda f: f.total(torch.linspace(-1, 1, f.count)),
    "dot": lambda f: f.dot(torch.ones(f.shape)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_factor, "TILE", BLOCK)
    monkeypatch.setattr(_factor, "LARGEST", BLOCK)
    monkeypatch.setattr(_conv_factor, "LARGEST", BLOCK)


def held(factor):
    return sum(v.nbytes for v in vars(factor).values() if isinstance(v, torch.Tensor))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", FACTORS)
def test_no_answer_takes_many_times_what_is_held(name, question):
    torch.manual_seed(3)
    factor = FACTORS[name]()
    factor.total()  # libraries set up their workspaces once
    with Peak() as peak:
        QUESTIONS[question](factor)
    leaf, gram = 4 * factor.shape.numel(), 8 * factor.count**2
    # A block of products and the temporaries around it, copies of what is held, the answer.
    assert peak.peak <= 5 * BLOCK + 3 * held(factor) + 3 * leaf + 3 * gram


@pytest.mark.usefixtures("float64", "small_blocks")
@pytest.mark.parametrize("large", [False, True], ids=["small blocks", "one block"])
@pytest.mark.parametrize("name", FACTORS)
def test_the_answers_are_those_of_the_rows(name, large, monkeypatch):
    if large:
        for module in (_factor, _conv_factor):
            monkeypatch.setattr(module, "LARGEST", 2**40)
    factor = FACTORS[name]()
    rows = factor.rows().flatten(1)
    want = {"gram": rows @ rows.T, "sq_norms": rows.square().sum(1), "dot": rows.sum(1)}
    want["total"] = torch.linspace(-1, 1, factor.count) @ rows
    for question, answer in QUESTIONS.items():
        uses = 4 if question.endswith("two uses") else 1
        got = answer(factor) / uses
        assert off(got.flatten(), want[question.split()[0]].flatten()) < 1e-12, question


def test_norms_of_64_sequences_of_1024_tokens():
    """Products of all positions with all others took 8.75 GB where the rows take 0.5 MB."""
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Flatten(), nn.Linear(64 * 1024, 2))
    batch = torch.randint(0, 1000, (64, 1024)), torch.arange(64) % 2
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, nn.functional.cross_entropy)
    of = lambda **options: gf.microbatch_grads(loss, 2, **options)(params, batch)
    want = of(plan="loop").sq_norms()
    rows = of(plan="fused", memory_budget=0)
    with Peak() as peak:
        got = rows.sq_norms()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert peak.peak < 2**28
