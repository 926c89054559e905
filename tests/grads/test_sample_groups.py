"""Rows that are groups of samples.

The reference is an ordinary backward pass of a plain module for each row, over its own samples.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _models import ConvBN, Dropped, OldStyle, images, vectors
from _naive import assert_close
from gradfilter.grads import _sample_groups
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
PLANS = ("auto", "fused", "loop", "vmap")
every_plan = pytest.mark.parametrize("plan", PLANS)
EACH = partial(F.cross_entropy, reduction="none")
N, M = 12, 5
INDEX = torch.tensor([0, 2, 2, 0, 4, 4, 4, 4, 2, 0, 0, 1])  # nothing in row 3
WEIGHTS = torch.tensor([1, 0, 2, 1, 0.5, 0, 3, 1, 1, 0, 2, 0], dtype=torch.float64)  # nor in row 1


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def labelled(n=N):
    return torch.randn(n, 6), torch.randint(3, (n,))


def naive_rows(model, batch, index, weights, m=M):
    """Return the losses and the gradients of the rows, by ``loss.backward()``."""
    x, y = batch
    losses, rows = [], {name: [] for name, _ in model.named_parameters()}
    for row in range(m):
        own = ((index == row) & (weights > 0)).nonzero().flatten()
        model.zero_grad()
        losses.append(torch.nan)
        if len(own):
            each = F.cross_entropy(model(x[own]), y[own], reduction="none")
            loss = (weights[own] * each).sum() / weights[own].sum()
            loss.backward()
            losses[-1] = loss.item()
        for name, p in model.named_parameters():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return torch.tensor(losses), {name: torch.stack(g) for name, g in rows.items()}


def rows_of(model, batch, plan="auto", criterion=EACH, m=M, index=INDEX, weights=None, **options):
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), m, plan=plan, **options)
    return grads_of(params, batch, buffers=buffers, groups=index, sample_weights=weights)


def close(found, expected):
    torch.testing.assert_close(found, expected, equal_nan=True)


def check(found, rows, losses):
    """Compare every question with the rows, also of scaled and cut stacks."""
    m, names = len(losses), list(rows)
    close(found.losses, losses)
    assert found.live.tolist() == [loss == loss for loss in losses.tolist()]
    factors = torch.linspace(-1, 1, m)
    tree = {name: g[0] + 0.5 for name, g in rows.items()}
    views = {
        "whole": lambda stack: stack,
        "scaled": lambda stack: stack.scaled(factors),
        "columns": lambda stack: stack.columns(names[:2]),
        "first": lambda stack: stack.first(m - 1 or 1),
        "all": lambda stack: stack.scaled(factors).columns(names[1:]).first(m - 1 or 1),
    }
    for view in views.values():
        own, expected = view(found), view(gf.DenseStack(rows, losses=losses))
        share = torch.linspace(0.5, 2, len(own))
        close(own.gram(), expected.gram())
        close(own.sq_norms(), expected.sq_norms())
        assert_close(own.combine(share), expected.combine(share))
        assert_close(own.stacked(), expected.stacked())
        part = {name: tree[name] for name in own.shapes}
        close(own.dot(part), expected.dot(part))
        close(own.live, expected.live)
        close(own.losses, expected.losses)


@every_plan
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("many", [False, True])
def test_a_row_is_the_mean_of_its_samples(plan, weights, many, monkeypatch):
    monkeypatch.setattr(_sample_groups, "MOST_SAMPLES", 4 if many else 2048)
    model, batch = mlp(), labelled()
    own = torch.ones(N) if weights is None else weights
    losses, rows = naive_rows(copy.deepcopy(model), batch, INDEX, own)
    for criterion in (EACH, F.cross_entropy):
        found = rows_of(model, batch, plan, criterion, weights=weights)
        check(found, rows, losses)
        assert found.gram_is_cheap() is not many
    assert found.explain().startswith("5 rows of 12 samples\n")


@every_plan
@pytest.mark.parametrize("budget", [0, 0.25])
def test_rows_from_samples_of_which_nothing_is_held(plan, budget):
    model, batch = mlp(), labelled()
    losses, rows = naive_rows(copy.deepcopy(model), batch, INDEX, torch.ones(N))
    found = rows_of(model, batch, plan, memory_budget=budget)
    assert_close(found.stacked(), rows)
    found.release()
    check(found, rows, losses)


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 9))
def test_any_groups(seed, m, n):
    torch.manual_seed(seed)
    model, batch = mlp(), labelled(n)
    index, weights = torch.randint(m, (n,)), torch.rand(n) * torch.randint(2, (n,))
    losses, rows = naive_rows(copy.deepcopy(model), batch, index, weights, m)
    check(rows_of(model, batch, m=m, index=index, weights=weights), rows, losses)


@every_plan
def test_groups_of_one_size_are_microbatches(plan):
    model, batch = mlp(), labelled()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4, plan=plan)
    expected = grads_of(params, batch)
    found = grads_of(params, batch, groups=torch.arange(4).repeat_interleave(3))
    assert_close(found.stacked(), expected.stacked())
    close(found.gram(), expected.gram())
    order = torch.randperm(N)  # the samples may be in any order
    found = grads_of(
        params, tuple(t[order] for t in batch), groups=torch.arange(4).repeat_interleave(3)[order]
    )
    assert_close(found.stacked(), expected.stacked())


@every_plan
def test_at_at_rows_and_along(plan):
    model, batch = mlp(), labelled()
    found = rows_of(model, batch, plan, weights=WEIGHTS)
    params, moved = gf.extract(model)[0], copy.deepcopy(model)
    near = {name: p + 0.1 for name, p in params.items()}
    gf.insert(moved, near)
    losses, rows = naive_rows(moved, batch, INDEX, WEIGHTS)
    check(found.at(near), rows, losses)
    scaled = found.scaled(torch.linspace(-1, 1, M)).columns(["0.bias"])
    expected = gf.DenseStack(rows).scaled(torch.linspace(-1, 1, M)).columns(["0.bias"])
    assert_close(scaled.at(near).stacked(), expected.stacked())
    steps, own = torch.linspace(-0.5, 0.5, M), found.stacked()
    along = found.along(steps)
    for m in (0, 2, 4):
        gf.insert(moved, {name: p + steps[m] * own[name][m] for name, p in params.items()})
        losses, rows = naive_rows(moved, batch, INDEX, WEIGHTS)
        close(along.losses[m], losses[m])
        close(along.at({}).losses[m], losses[m])
        for name, g in along.stacked().items():
            close(g[m], rows[name][m])
    assert along.live.tolist() == found.live.tolist()


@every_plan
def test_dropout_draws_the_same_numbers_again(plan):
    model, batch = Dropped(), vectors(N)
    found = rows_of(model, batch, plan)
    again = found.at(gf.extract(model)[0])
    assert_close(again.stacked(), found.stacked())
    close(again.losses, found.losses)


@every_plan
def test_samples_that_are_not_finite(plan):
    model, (x, y) = mlp(), labelled()
    x = torch.where((torch.arange(N) == 8)[:, None], torch.inf, x)  # in row 2
    _, rows = naive_rows(copy.deepcopy(model), (x, y), INDEX, torch.ones(N))
    found = rows_of(model, (x, y), plan)
    assert found.sq_norms().isfinite().tolist() == [True, True, False, True, True]
    assert found.gram()[0, 2].isnan() and found.gram()[0, 4].isfinite()
    params = gf.extract(model)[0]
    update = gf.chain(gf.finite_filter(), gf.mean_rows())
    grads, _, _ = update.update(found, update.init(params), params)
    assert_close(grads, {name: g[[0, 1, 4]].mean(0) for name, g in rows.items()})
    weights = (torch.arange(N) != 8).double()
    _, rows = naive_rows(copy.deepcopy(model), (x, y), INDEX, weights)
    assert_close(rows_of(model, (x, y), plan, weights=weights).stacked(), rows)


@every_plan
def test_a_sample_without_a_label_takes_no_part(plan):
    model, (x, y) = mlp(), labelled()
    y[torch.tensor([0, 11])] = -100  # of rows 0 and 1; the second has no other
    found = rows_of(model, (x, y), plan, F.cross_entropy)
    own = (y >= 0).double()
    losses, rows = naive_rows(copy.deepcopy(model), (x, y), INDEX, own)
    check(found, rows, losses)


@every_plan
def test_batch_norm_is_refused_in_training(plan):
    model, batch = ConvBN(), images(N)
    with pytest.raises(ValueError, match=r"do not affect each other.*BatchNorm.*module\.eval"):
        rows_of(model, batch, plan)
    model.eval()
    losses, rows = naive_rows(copy.deepcopy(model), batch, INDEX, torch.ones(N))
    found = rows_of(model, batch, plan)
    close(found.losses, losses)
    assert_close(found.stacked(), rows)


def test_samples_that_fall_back_to_the_loop():
    model, batch = mlp(), labelled()
    old = lambda out, y: EACH(OldStyle.apply(out) / 2, y)
    with pytest.warns(UserWarning, match="Fell back"):
        found = rows_of(model, batch, criterion=old)
    losses, rows = naive_rows(copy.deepcopy(model), batch, INDEX, torch.ones(N))
    check(found, rows, losses)
    assert 'fell back to plan "loop"' in found.explain()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    filtered = Filtered(model, old, gf.mean_rows(), sgd, M)
    with pytest.warns(UserWarning, match="Fell back"):
        filtered.step(*batch, groups=INDEX)
    filtered.step(*batch, groups=INDEX)  # without another attempt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_plan
def test_other_dtypes(plan, dtype):
    model, (x, y) = mlp().to(dtype), labelled()
    found = rows_of(model, (x.to(dtype), y), plan)
    assert found.losses.dtype == dtype and found.gram().dtype == torch.float64
    assert {g.dtype for g in found.stacked().values()} == {dtype}
    assert {g.dtype for g in found.combine(torch.ones(M)).values()} == {dtype}
    _, rows = naive_rows(copy.deepcopy(model), (x.to(dtype), y), INDEX, torch.ones(N))
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for name, g in found.stacked().items():
        torch.testing.assert_close(g, rows[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (INDEX.tolist(), TypeError, "int64 tensor, found list"),
        (INDEX.int(), TypeError, r"found torch.int32.*from 0 to 4"),
        (INDEX[:-1], ValueError, r"shape \(12,\), found \(11,\)"),
        (INDEX + 1, ValueError, "from 0 to 4, found 5"),
        (INDEX - 1, ValueError, "from 0 to 4, found -1"),
    ],
)
def test_bad_groups_are_refused_before_a_pass(index, error, text):
    def criterion(out, y):
        raise AssertionError("ran")

    with pytest.raises(error, match=text):
        rows_of(mlp(), labelled(), criterion=criterion, index=index)


def test_groups_need_their_number():
    model = mlp()
    grads_of = gf.per_sample_grads(gf.model_loss(model, EACH))
    with pytest.raises(ValueError, match=r"microbatch_grads\(loss, M\)"):
        grads_of(gf.extract(model)[0], labelled(), groups=INDEX)


UPDATES = {
    "agreement": lambda: gf.chain(gf.agree_filter(1.2), gf.sgd(0.1)),
    "consensus": lambda: gf.chain(gf.consensus_filter(1.0), gf.sgd(0.1)),
    "clip": lambda: gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.sgd(0.1)),
    "sam": lambda: gf.chain(gf.sam_perturb(0.05, per_microbatch=True), gf.mean_rows(), gf.sgd(0.1)),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_steps_of_every_kind_agree(update, weights):
    model, batch, given = mlp(), labelled(), {"groups": INDEX, "sample_weights": weights}
    chain = UPDATES[update]()
    step = gf.train_step(gf.model_loss(model, EACH), chain, microbatches=M)
    state, info = step(step.init(model), batch, **given)
    losses, rows = naive_rows(
        copy.deepcopy(model), batch, INDEX, torch.ones(N) if weights is None else weights
    )
    close(info["loss"], losses.nanmean())
    if update != "sam":
        params = gf.extract(model)[0]
        expected, _, _ = chain(params, chain.init(params), gf.DenseStack(rows, losses=losses))
        assert_close(state["params"], expected)
    found, shown = gf.compile(step, backend="graph")(step.init(model), batch, **given)
    assert_close(found["params"], state["params"])
    close(shown["loss"], info["loss"])
    filtering = gf.chain(*list(chain.parts)[:-1])
    for compile in (False, "graph"):
        for scaler in (None, torch.amp.GradScaler("cpu")):
            own = copy.deepcopy(model)
            sgd = torch.optim.SGD(own.parameters(), 0.1)
            filtered = Filtered(own, EACH, filtering, sgd, M, compile=compile, scaler=scaler)
            result = filtered.step(*batch, **given)
            assert_close(gf.extract(own)[0], state["params"])
            close(result.loss, info["loss"])


@pytest.mark.parametrize("update", [gf.mean_rows, lambda: gf.agree_filter(2.0)])
def test_accumulated_batches_have_groups_of_their_own(update):
    model, batches = mlp(), [labelled() for _ in range(2)]
    own, indices = copy.deepcopy(model), [INDEX, torch.arange(N) % M]
    sgd = torch.optim.SGD(own.parameters(), 0.1)
    filtered = Filtered(own, EACH, gf.chain(update()), sgd, M)
    filtered.accumulate(*batches[0], groups=indices[0])
    filtered.step(*batches[1], groups=indices[1])
    rows = [
        naive_rows(copy.deepcopy(model), batch, index, torch.ones(N))[1]
        for batch, index in zip(batches, indices, strict=True)
    ]
    for name, p in model.named_parameters():
        mean = torch.cat([part[name] for part in rows]).sum(0) / 9  # of 10, one is empty
        close(own.get_parameter(name).detach(), (p - 0.1 * mean).detach())


def test_a_compiled_host_refuses_another_pass_over_accumulated_groups():
    model, plain = mlp(), None
    for chain in (gf.mean_rows(), gf.agree_filter(2.0)):
        for compile in (False, "graph"):
            own = copy.deepcopy(model)
            sgd = torch.optim.SGD(own.parameters(), 0.1)
            filtered = Filtered(own, EACH, chain, sgd, M, compile=compile)
            torch.manual_seed(1)
            filtered.accumulate(*labelled(), groups=INDEX)
            filtered.step(*labelled(), groups=INDEX)
            plain = gf.extract(own)[0] if plain is None else plain
            assert_close(gf.extract(own)[0], plain)
    sam = gf.chain(gf.sam_perturb(0.1), gf.agree_filter(2.0))
    filtered = Filtered(
        model, EACH, sam, torch.optim.SGD(model.parameters(), 0.1), M, compile="graph"
    )
    filtered.accumulate(*labelled(), groups=INDEX)
    with pytest.raises(ValueError, match="rows of equal sizes for another pass"):
        filtered.step(*labelled(), groups=INDEX)


def test_groups_in_parts_are_refused():
    model = mlp()
    step = gf.train_step(
        gf.model_loss(model, EACH), UPDATES["clip"](), microbatches=M, rows_at_once=2
    )
    with pytest.raises(ValueError, match="rows_at_once=None with groups=, found 2"):
        step(step.init(model), labelled(), groups=INDEX)
