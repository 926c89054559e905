"""Rows without labels: they are omitted, and rows that diverged are not taken for them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _naive import assert_close
from gradfilter.grads.fused import _fused_stack as _pass
from gradfilter.grads.fused.overrides import _cross_entropy
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
PLANS = ("fused", "loop", "vmap")
M, B, IGNORED = 4, 3, -100


def weights():
    return torch.tensor([0.5, 1.0, 2.0, 0.7, 1.3])


CRITERIA = {
    "cross_entropy": lambda o, y: F.cross_entropy(o, y),
    "module": nn.CrossEntropyLoss(),
    "another index": lambda o, y: F.cross_entropy(
        o, torch.where(y == IGNORED, 2, y % 2), ignore_index=2
    ),
    "weighted": lambda o, y: F.cross_entropy(o, y, weight=weights()),
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "both": lambda o, y: F.cross_entropy(o, y, weight=weights(), label_smoothing=0.1),
    "nll_loss": lambda o, y: F.nll_loss(o.log_softmax(1), y),
    "per token": lambda o, y: F.cross_entropy(torch.stack([o, o.sin()], 2), torch.stack([y, y], 1)),
    "by hand": lambda o, y: F.cross_entropy(o, y, reduction="none").sum() / (y != IGNORED).sum(),
}
# What is chosen by a mask is known to the loop alone.
ON_THE_LOOP = {
    "indexed": lambda o, y: F.cross_entropy(o[y != IGNORED], y[y != IGNORED]),
    "mean of nothing": lambda o, y: F.cross_entropy(o, y, reduction="none")[y != IGNORED].mean(),
}
every_way = pytest.mark.parametrize(
    ("plan", "criterion"),
    [(plan, name) for plan in PLANS for name in CRITERIA]
    + [("loop", name) for name in ON_THE_LOOP],
)


def problem(empty=(0,)):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x, y = torch.randn(M * B, 6), torch.arange(M * B) % 5
    y[1] = IGNORED
    for m in empty:
        y[m * B : (m + 1) * B] = IGNORED
    return model, x, y


def rows_of(model, criterion, x, y, plan):
    loss = gf.model_loss(model, criterion)
    return gf.microbatch_grads(loss, len(x) // B, plan=plan)(gf.extract(model)[0], (x, y))


def by_hand(model, criterion, x, y, live):
    """Ordinary backward passes over the live microbatches, on the plain module."""
    model, found, losses = copy.deepcopy(model), [], []
    for m in live:
        rows = slice(m * B, (m + 1) * B)
        loss = criterion(model(x[rows]), y[rows])
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    columns = zip(*found, strict=True)
    mean = {name: torch.stack(g).mean(0) for name, g in zip(names, columns, strict=True)}
    return mean, torch.stack(losses).mean()


@every_way
@pytest.mark.parametrize("empty", [(0,), (2,), (0, 3), ()])
def test_the_mean_and_the_loss_are_those_of_the_rows_with_labels(plan, criterion, empty):
    criterion = {**CRITERIA, **ON_THE_LOOP}[criterion]
    model, x, y = problem(empty)
    rows = rows_of(model, criterion, x, y, plan)
    live = [m for m in range(M) if m not in empty]
    grads, loss = by_hand(model, criterion, x, y, live)
    assert rows.live.tolist() == [m in live for m in range(M)]
    assert rows.losses.isnan().tolist() == [m in empty for m in range(M)]
    params = gf.extract(model)[0]
    got, _, _ = gf.mean_rows().update(rows, {}, params)
    assert_close(got, grads)
    assert_close(rows.mean_loss(), loss)


@pytest.mark.parametrize("plan", PLANS)
def test_no_question_is_answered_by_nan(plan):
    model, x, y = problem()
    rows = rows_of(model, F.cross_entropy, x, y, plan)
    ones = torch.ones(M)
    answers = [rows.gram(), rows.sq_norms(), *rows.combine(ones).values()]
    answers += [rows.dot(gf.extract(model)[0]), *rows.stacked().values()]
    assert all(answer.isfinite().all() for answer in answers)


FILTERS = {
    "agree_filter": lambda: gf.agree_filter(1.99),
    "first": lambda: gf.agree_filter(1.99, against="first"),
    "consensus": lambda: gf.consensus_filter(2.0),
    "mean": lambda: gf.mean_rows(),
    "finite": lambda: gf.chain(gf.finite_filter(), gf.mean_rows()),
    "clipped": lambda: gf.chain(gf.clip_per_row(100.0), gf.mean_rows()),
    "budget": lambda: gf.chain(gf.budget_clip(1e9), gf.mean_rows()),
    "signs": lambda: gf.sign_agreement(0.6),
    "sharp": lambda: gf.chain(gf.sam_perturb(0.05), gf.mean_rows()),
    "sharp after": lambda: gf.chain(gf.mean_rows(), gf.sam_perturb(0.05)),
    "on some leaves": lambda: gf.partition(
        {
            "a": gf.chain(gf.agree_filter(1.99), gf.sgd(1.0)),
            "b": gf.chain(gf.mean_rows(), gf.sgd(1)),
        },
        lambda name: "a" if name.startswith("0") else "b",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_filter_gives_what_it_gives_without_the_row(plan, name):
    """Ground truth: the same batch without the samples of the empty row."""
    model, x, y = problem()
    params, update = gf.extract(model)[0], FILTERS[name]()
    out = [
        update.update(rows_of(model, F.cross_entropy, *part, plan), update.init(params), params)
        for part in ((x, y), (x[B:], y[B:]))
    ]
    assert_close(out[0][0], out[1][0])
    for key in {"keep", "surrogate_gap", "sam_perturb/surrogate_gap"} & out[1][2].keys():
        assert_close(out[0][2][key], out[1][2][key])


@pytest.mark.parametrize("plan", PLANS)
def test_the_first_row_with_labels_is_the_anchor(plan):
    model, x, y = problem()
    rows = rows_of(model, F.cross_entropy, x, y, plan)
    _, _, out = gf.agree_filter(1.99).update(rows, {}, gf.extract(model)[0])
    assert out["keep"] and out["accepted"].tolist() == [False, True, True, True]
    assert out["cosine"][0].isnan() and out["cosine"][1] == 1


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("labels", ["ignored", "kept"])
def test_a_row_that_diverged_is_bad_and_not_empty(plan, labels):
    model, x, y = problem(empty=(0,) if labels == "ignored" else ())
    x[0, 0] = torch.nan
    rows = rows_of(model, F.cross_entropy, x, y, plan)
    assert rows.losses[0].isnan()
    assert rows.live.all()
    params = gf.extract(model)[0]
    spoilt, _, _ = gf.mean_rows().update(rows, {}, params)
    assert all(leaf.isnan().any() for leaf in spoilt.values())
    filtered = gf.chain(gf.finite_filter(), gf.mean_rows())
    kept, _, out = filtered.update(rows, filtered.init(params), params)
    assert out["finite_filter/finite"].tolist() == [False, True, True, True]
    assert_close(kept, by_hand(model, F.cross_entropy, x, y, range(1, M))[0])


@pytest.mark.parametrize("plan", PLANS)
def test_a_mean_over_nothing_whose_gradient_is_nan_is_bad(plan):
    """As in an ordinary loop, where it spoils the parameters."""
    model, x, y = problem()
    criterion = lambda o, y: (o.sum(1) * (y != IGNORED)).sum() / (y != IGNORED).sum()
    rows = rows_of(model, criterion, x, y, plan)
    assert rows.live.all() and rows.sq_norms()[0].isnan()


@pytest.mark.parametrize("plan", PLANS)
def test_a_term_that_has_a_gradient_keeps_a_row_in(plan):
    model, x, y = problem()
    criterion = lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean()
    rows = rows_of(model, criterion, x, y, plan)
    assert rows.live.all() and rows.losses[0].isnan() and rows.sq_norms()[0] > 0


@pytest.mark.parametrize("plan", [*PLANS, "auto"])
def test_a_step_says_the_mean_of_the_losses_there_are(plan):
    model, x, y = problem()
    grads, loss = by_hand(model, F.cross_entropy, x, y, range(1, M))
    update = gf.chain(gf.mean_rows(), gf.sgd(0.5))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=M, plan=plan)
    state = step.init(model)
    new, info = step(state, (x, y))
    assert_close(info["loss"], loss)
    assert_close(new["params"], {n: p - 0.5 * grads[n] for n, p in state["params"].items()})


@pytest.mark.parametrize("plan", PLANS)
def test_without_any_label_nothing_moves_and_the_loss_is_nan(plan):
    model, x, y = problem(empty=range(M))
    update = gf.chain(gf.mean_rows(), gf.sgd(0.5))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=M, plan=plan)
    state = step.init(model)
    new, info = step(state, (x, y))
    assert info["loss"].isnan() and not rows_of(model, F.cross_entropy, x, y, plan).live.any()
    assert_close(new["params"], state["params"])
    guarded = gf.chain(gf.finite_filter(), update)
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), guarded, microbatches=M, plan=plan)
    assert not step(step.init(model), (x, y))[1]["keep"]


def test_cuts_and_factors_know_which_rows_are_empty():
    for plan in PLANS:
        model, x, y = problem(empty=(1,))
        rows = rows_of(model, F.cross_entropy, x, y, plan)
        expected = [True, False, True, True]
        assert rows.columns(["2.bias"]).live.tolist() == expected
        assert rows.first(2).live.tolist() == expected[:2]
        assert rows.scaled(torch.tensor([0.0, 1, 1, 2])).live.tolist() == [False, False, True, True]
        assert rows.at(gf.extract(model)[0]).live.tolist() == expected
        rows.release()
        assert rows.live.tolist() == expected


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("accumulated", [False, True])
def test_filtered_leaves_the_row_out(plan, accumulated):
    model, x, y = problem()
    grads, loss = by_hand(model, F.cross_entropy, x, y, range(1, M))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    filtered = Filtered(model, F.cross_entropy, gf.mean_rows(), optimizer, 2, plan=plan)
    before = gf.extract(model)[0]
    if accumulated:
        empty_and_one = filtered.accumulate(x[: 2 * B], y[: 2 * B])
        rest = filtered.step(x[2 * B :], y[2 * B :]).loss
        assert_close(empty_and_one, by_hand_loss(before, x, y, [1]))
        assert_close(rest, loss)
    else:
        filtered = Filtered(model, F.cross_entropy, gf.mean_rows(), optimizer, M, plan=plan)
        assert_close(filtered.step(x, y).loss, loss)
    assert_close(gf.extract(model)[0], {n: p - 0.5 * grads[n] for n, p in before.items()})


def by_hand_loss(params, x, y, live):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    gf.insert(model, params)
    return by_hand(model, F.cross_entropy, x, y, live)[1]


def test_rows_that_are_empty_as_a_whole_only():
    """A leaf that this row does not use has gradient zero there."""
    rows = {"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[torch.nan], [1.0]])}
    stack = gf.DenseStack(rows, losses=torch.tensor([torch.nan, 1.0]))
    assert stack.live.all() and stack.columns(["a"]).live.all()


@pytest.mark.parametrize("name", CRITERIA)
def test_where_losses_cannot_be_looked_at_the_labels_say_it(name, monkeypatch):
    """As on a GPU, which nobody waits for."""
    for module in (_pass, _cross_entropy):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    for empty in ((0, 2), ()):
        model, x, y = problem(empty)
        rows = rows_of(model, CRITERIA[name], x, y, "fused")
        expected = [m not in empty for m in range(M)]
        assert rows.live.tolist() == expected
        rows.gram()
        assert rows.live.tolist() == expected


def test_several_heads_without_labels_to_look_at(monkeypatch):
    for module in (_pass, _cross_entropy):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    model, x, y = problem()
    criterion = lambda o, y: F.cross_entropy(o, y) + F.cross_entropy(-o, y.clamp(min=0))
    rows = rows_of(model, criterion, x, y, "fused")
    assert rows.live.all() and rows.losses[0].isnan()
