"""Losses for which vmap has no rule: equal to ordinary backward passes, and without warnings."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _compiled import check_compiled
from _plain import module_rows, off, side_by_side
from gradfilter.grads.fused._fused_stack import FusedStack

D, C = 4, 5


def signs(y):
    return torch.where(y.cos() > 0, 1.0, -1.0).to(y.dtype)


def weighted(found):
    """Weight the entries of a loss without reduction."""
    return (found * torch.arange(1, 1 + found.numel(), dtype=found.dtype).view(found.shape)).sum()


def labels(y):
    return (y.abs() * 10).long() % C


def ctc(h, y, reduction="mean", lengths=tuple, targets=2, **options):
    """Compute the loss of sequences of 8 steps, of which some are omitted."""
    n = len(h)
    steps = h[:, None] * torch.linspace(-1, 1, 8, dtype=h.dtype)[:, None] + y[:, :1, None]
    marks = 1 + labels(y)[:, :3] % (C - 1)
    used, known = ([8 - k % 2 for k in range(n)], [2 + k % 2 for k in range(n)])
    given = (tuple, lambda x: torch.tensor(x))[lengths is not tuple]
    if targets == 1:
        marks = torch.cat([row[:k] for row, k in zip(marks, known, strict=True)])
    probs = steps.transpose(0, 1).log_softmax(-1)
    return F.ctc_loss(probs, marks, given(used), given(known), reduction=reduction, **options)


# By name: loss of (scores (B, C), numbers (B, C)).
LOSSES = {
    "kl_div": lambda h, y: F.kl_div(h.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "kl_div, log": lambda h, y: F.kl_div(
        h.log_softmax(-1), y.log_softmax(-1), reduction="sum", log_target=True
    ),
    "kl_div, none": lambda h, y: weighted(F.kl_div(h, y.abs(), reduction="none")),
    "kl_div, broadcast": lambda h, y: F.kl_div(h, y[0].abs(), reduction="batchmean"),
    "kl_div of both": lambda h, y: F.kl_div(
        h.log_softmax(-1), h.sin().softmax(-1), reduction="batchmean"
    ),
    "KLDivLoss": lambda h, y: nn.KLDivLoss(reduction="batchmean")(h, y.softmax(-1)),
    "kl_div by position": lambda h, y: F.kl_div(h, y.abs(), None, None, "batchmean"),
    "kl_div, old": lambda h, y: F.kl_div(h, y.abs(), size_average=False),
    "torch.kl_div": lambda h, y: torch.kl_div(h, y.abs(), 2),
    "soft_margin": lambda h, y: F.soft_margin_loss(h, signs(y)),
    "soft_margin, sum": lambda h, y: F.soft_margin_loss(h, signs(y), reduction="sum"),
    "margin_ranking": lambda h, y: F.margin_ranking_loss(h, y, signs(y), margin=0.3),
    "margin_ranking, none": lambda h, y: weighted(
        F.margin_ranking_loss(h, h.flip(1), signs(y), reduction="none")
    ),
    "multi_margin": lambda h, y: F.multi_margin_loss(h, labels(y[:, 0]), margin=0.8),
    "multi_margin, none": lambda h, y: weighted(
        F.multi_margin_loss(h, labels(y[:, 0]), p=2, reduction="none")
    ),
    "multi_margin, weighted": lambda h, y: F.multi_margin_loss(
        h, labels(y[:, 0]), weight=torch.linspace(0.5, 2, C, dtype=h.dtype)
    ),
    "multi_margin of one": lambda h, y: F.multi_margin_loss(h[0], labels(y[0, 0])),
    "multilabel_margin": lambda h, y: F.multilabel_margin_loss(h, labels(y), reduction="sum"),
    "multilabel_margin of one": lambda h, y: F.multilabel_margin_loss(h[0], labels(y[0])),
    "triplet": lambda h, y: F.triplet_margin_loss(h, y, h.flip(1), margin=3, swap=True),
    "triplet, none": lambda h, y: weighted(
        F.triplet_margin_loss(h, y, y.flip(1), margin=3, reduction="none")
    ),
    "triplet, broadcast": lambda h, y: F.triplet_margin_loss(h, y[:1], y.flip(1), margin=3),
    "triplet of one": lambda h, y: F.triplet_margin_loss(h[0], y[0], y[0].flip(0), margin=3),
    "ctc": ctc,
    "ctc, sum": lambda h, y: ctc(h, y, "sum"),
    "ctc, none": lambda h, y: weighted(ctc(h, y, "none", zero_infinity=True)),
    "ctc, lengths in tensors": lambda h, y: ctc(h, y, lengths=list),
    "ctc, another blank": lambda h, y: ctc(h, y, blank=C - 1, zero_infinity=True),
    "ctc, joined targets": lambda h, y: ctc(h, y, targets=1),
    "gaussian": lambda h, y: F.gaussian_nll_loss(h, y, y.abs() + 0.1, full=True),
    "gaussian, of samples": lambda h, y: F.gaussian_nll_loss(h, y, h.exp()[:, 0], reduction="sum"),
    "gaussian, one number": lambda h, y: weighted(
        F.gaussian_nll_loss(h, y, torch.full_like(h, 0.7), reduction="none")
    ),
    "gaussian, broadcast": lambda h, y: F.gaussian_nll_loss(h, y, h.exp()[:, :1]),
}
ROW_BY_ROW = {
    *("kl_div, old", "torch.kl_div", "multi_margin, weighted", "multi_margin of one"),
    *("multilabel_margin of one", "triplet, broadcast", "ctc, joined targets"),
}
"""Losses whose arguments are unusual."""


def model_and_batch(m, b, dtype=torch.float64):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).to(dtype)
    return model, (torch.randn(m * b, D, dtype=dtype), torch.randn(m * b, C, dtype=dtype))


def stack(model, criterion, batch, m, plan="auto"):
    loss = gf.model_loss(model, criterion)
    grads_of = (
        gf.per_sample_grads(loss, plan=plan)
        if m == len(batch[0])
        else gf.microbatch_grads(loss, m, plan=plan)
    )
    return grads_of(gf.extract(model)[0], batch)


@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.parametrize(("m", "b"), [(3, 2), (4, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_rows_of_ordinary_passes(name, m, b):
    model, batch = model_and_batch(m, b)
    losses, want = module_rows(model, LOSSES[name], batch, m)
    rows = stack(model, LOSSES[name], batch, m)  # a warning would be an error
    assert isinstance(rows, FusedStack)
    torch.testing.assert_close(rows.losses, losses)
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-11
    if name != "triplet, broadcast" or b > 1:
        assert ("row by row inside the pass" in rows.explain()) == (name in ROW_BY_ROW)


def test_a_negative_variance_is_refused_as_torch_does():
    model, batch = model_and_batch(3, 2)
    wrong = lambda h, y: F.gaussian_nll_loss(h, y, -y.abs())
    with pytest.raises(ValueError, match="negative"):
        stack(model, wrong, batch, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "soft_margin", "margin_ranking", "triplet"])
def test_half_precision_is_as_good_as_a_plain_pass(name, dtype):
    model, batch = model_and_batch(3, 2, dtype)
    _, plain = module_rows(model, LOSSES[name], batch, 3)
    found = stack(model, LOSSES[name], batch, 3).stacked()
    wide = tuple(t.double() for t in batch)
    _, exact = module_rows(model.double(), LOSSES[name], wide, 3)
    exact = side_by_side(exact, exact)
    got, eager = (side_by_side({n: g.double() for n, g in r.items()}, r) for r in (found, plain))
    floor = 8 * torch.finfo(dtype).eps * exact.norm()
    assert (got - exact).norm() <= 4 * (eager - exact).norm() + floor


@pytest.mark.parametrize("name", ["kl_div", "soft_margin", "triplet", "multi_margin"])
def test_autocast_gives_the_losses_of_a_plain_pass(name):
    model, batch = model_and_batch(3, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses, want = module_rows(model, LOSSES[name], batch, 3)
        rows = stack(model, LOSSES[name], batch, 3)
    assert rows.losses.dtype == losses.dtype
    torch.testing.assert_close(rows.losses, losses, rtol=0.02, atol=0.02)
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 0.05


@pytest.mark.parametrize("name", ["kl_div", "soft_margin", "triplet"])
def test_a_compiled_step_equals_the_step(name):
    model, batch = model_and_batch(3, 2)
    check_compiled(model, LOSSES[name], batch, 3)


def test_a_loss_that_reads_the_variance_cannot_be_compiled():
    model, batch = model_and_batch(3, 2)
    with pytest.raises(RuntimeError, match=r"cannot be traced: .*gaussian_nll_loss"):
        check_compiled(model, LOSSES["gaussian, of samples"], batch, 3)


def test_no_loss_of_torch_warns_under_auto():
    """Every loss that is a module of torch, of the arguments that it takes."""
    criteria = [
        *(nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()),
        *(nn.SoftMarginLoss(), nn.PoissonNLLLoss(), nn.HingeEmbeddingLoss(), nn.KLDivLoss()),
        *(nn.MultiLabelSoftMarginLoss(), nn.CrossEntropyLoss()),
    ]
    model, (x, y) = model_and_batch(3, 2)
    batch = x, (y > 0).double()
    for criterion in criteria:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "reduction: 'mean' divides")
            rows = stack(model, criterion, batch, 3)
        _, want = module_rows(model, criterion, batch, 3)
        assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-11
