"""A row that is not finite never reaches a combination in which its weight is 0."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _zoo import ZOO
from _zoo_case import PLAN
from _zoo_check import assert_trees_close, probe_for

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

M, B, BAD = 4, 3, 2
WEIGHTS = torch.tensor([0.3, -0.2, 0.0, 0.9], dtype=torch.float64)
GOOD = torch.arange(M) != BAD

# One of each way to keep a layer: by its inputs and outputs, by its rows, by a kernel per row.
NAMES = [
    *("linear-2d", "linear-3d", "linear-in-place-relu", "einsum", "lenet", "conv2d-groups"),
    *("conv1d", "transposed2d", "batch-norm-maps", "batch-norm-eval", "batch-norm-twice"),
    *("layer-norm-0", "group-norm-5", "instance-norm-9", "rms-norm-13", "attention-causal"),
    *("multi-head-self", "encoder-pre-norm", "lstm", "gru-deep", "used-twice", "two-names"),
    *("lora-adapter", "token-and-scale", "frozen-biases", "weight-standardised"),
]
every_case = pytest.mark.parametrize("name", NAMES)
every_ill = pytest.mark.parametrize("ill", ["nan", "inf", "derivative"])


def blow_up(case, ill):
    """The batch and the criterion with microbatch BAD ill."""
    x, y = case.samples(M, B)
    first = BAD * B
    if ill != "derivative":
        x = x.clone()
        x[first].view(-1)[0] = float(ill)
        return (x, y), case.criterion
    y = y.clone()
    y[first : first + B] += 100

    def criterion(output, y):
        # The square root's derivative at zero is infinite, and zero times that is no number.
        ill = y >= 100
        root = torch.where(ill, 0.0 * output.flatten(1).sum(1), 1.0).sqrt()
        return case.criterion(output, y % 100) + torch.where(ill, root, 0.0).sum()

    return (x, y), criterion


def stacks(name, ill):
    """The loop's stack, a maker of fresh fused ones, and a probe."""
    case = ZOO[name]
    batch, criterion = blow_up(case, ill)
    model = case.model()
    loss = gf.model_loss(model, criterion)
    params, buffers = gf.extract(model)
    of = lambda plan: gf.microbatch_grads(loss, M, plan=plan)(params, batch, buffers=buffers)
    loop = of("loop")
    assert torch.equal(loop.sq_norms().isfinite(), GOOD), "exactly one row should be ill"
    if ill == "derivative":
        assert loop.losses.isfinite().all()
    return loop, lambda: of(PLAN), probe_for(params, M)


def assert_follows(got, want, where):
    """Finite, and the loop's."""
    assert all(leaf.isfinite().all() for leaf in got.values()), where
    floor = 1e-12 * sum(leaf.norm() for leaf in want.values())
    assert_trees_close(got, want, 1e-10, floor, where)


@every_ill
@every_case
def test_the_other_rows_combine_without_it(name, ill):
    loop, fresh, probe = stacks(name, ill)
    want = loop.combine(WEIGHTS)
    rows = fresh()
    assert_follows(rows.combine(WEIGHTS), want, "fresh")
    assert_follows(rows.combine(WEIGHTS), want, "again")
    rows = fresh()
    rows.gram()
    assert_follows(rows.combine(WEIGHTS), want, "after the Gram")
    rows = fresh()
    rows.sq_norms()
    rows.dot(probe.tree)
    assert_follows(rows.combine(WEIGHTS), want, "after norms and dots")
    scaled = fresh().scaled(WEIGHTS)
    assert_follows(scaled.combine(torch.ones_like(WEIGHTS)), want, "scaled")


@every_ill
@every_case
def test_answers_row_by_row_are_ill_in_that_row_only(name, ill):
    loop, fresh, probe = stacks(name, ill)
    pairs = GOOD[:, None] & GOOD
    gram = fresh().gram()
    assert torch.equal(gram.isfinite(), pairs)
    torch.testing.assert_close(gram[pairs], loop.gram()[pairs], rtol=1e-10, atol=1e-13)
    for answer in ("sq_norms", "dot"):
        ask = lambda rows, answer=answer: (
            rows.sq_norms() if answer == "sq_norms" else rows.dot(probe.tree)
        )
        got, want = ask(fresh()), ask(loop)
        assert torch.equal(got.isfinite(), GOOD), answer
        torch.testing.assert_close(got[GOOD], want[GOOD], rtol=1e-9, atol=1e-13)
    zeroed = fresh().scaled(WEIGHTS)
    want = loop.scaled(WEIGHTS)
    torch.testing.assert_close(zeroed.gram(), want.gram(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(zeroed.sq_norms(), want.sq_norms(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(zeroed.dot(probe.tree), want.dot(probe.tree), rtol=1e-9, atol=1e-13)
    stacked = fresh().stacked()
    for leaf, rows in loop.stacked().items():
        torch.testing.assert_close(stacked[leaf][GOOD], rows[GOOD], rtol=1e-9, atol=1e-13)


LINKS = {
    "agree": lambda: [gf.agree_filter(1.9)],
    "agree-strictly": lambda: [gf.agree_filter(0.9, against="first")],
    "finite": lambda: [gf.finite_filter(), gf.mean_rows()],
    "consensus": lambda: [gf.consensus_filter(1.9)],
    "clipped": lambda: [gf.finite_filter(), gf.clip_per_row(0.1), gf.mean_rows()],
    "signs": lambda: [gf.finite_filter(), gf.sign_agreement(0.6)],
    "sharp": lambda: [gf.agree_filter(1.9), gf.sam_perturb(0.01)],
}


@every_ill
@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("name", ["linear-3d", "lenet", "attention-causal", "lstm", "used-twice"])
def test_links_give_what_they_give_on_the_loop(name, links, ill):
    loop, fresh, probe = stacks(name, ill)
    update = gf.chain(*LINKS[links](), gf.sgd(0.1))
    state = update.init(probe.params)
    want, _, said = update(probe.params, state, loop)
    got, _, info = update(probe.params, state, fresh())
    assert_follows(got, want, links)
    assert info["keep"] == said["keep"]


def test_consensus_of_many_rows_asks_for_no_gram_and_leaves_the_ill_one_out():
    """Beyond a hundred rows or so consensus works from norms, one combination and one dot."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x, y = torch.randn(300, 6), torch.arange(300) % 5
    x[7, 0] = torch.nan
    params, _ = gf.extract(model)
    loss, update = gf.model_loss(model, F.cross_entropy), gf.chain(gf.consensus_filter(), gf.sgd(1))
    want, got = (
        update(params, update.init(params), gf.per_sample_grads(loss, plan=plan)(params, (x, y)))[0]
        for plan in ("loop", PLAN)
    )
    assert_follows(got, want, "consensus")
