"""Weights of samples, and batches whose size the number of rows does not divide.

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
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
from _models import ConvBN, Dropped, images, vectors
from _naive import assert_close
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
PLANS = ("auto", "fused", "loop", "vmap")
every_plan = pytest.mark.parametrize("plan", PLANS)
EACH = partial(F.cross_entropy, reduction="none")
N, M = 12, 4


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def labelled(n=N):
    return torch.randn(n, 6), torch.randint(3, (n,))


def some_weights():
    """Weights with a removed sample, and a row (samples 3 to 5) without any."""
    weights = torch.rand(N) + 0.1
    weights[3:6] = 0
    weights[7] = 0
    return weights


def naive_rows(model, batch, weights, sizes):
    """Return the losses and the gradients of rows of some sizes, by ``loss.backward()``.

    The samples of weight 0 are not given to the model. A row without any has the loss NaN.
    """
    losses, rows, start = [], {name: [] for name, _ in model.named_parameters()}, 0
    for size in sizes:
        x, y = (t[start : start + size] for t in batch)
        own = weights[start : start + size]
        start += size
        model.zero_grad()
        losses.append(torch.nan)
        if own.sum() > 0:
            loss = 0
            for sample in own.nonzero().flatten().tolist():
                each = F.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1])
                loss = loss + own[sample] / own.sum() * each
            loss.backward()
            losses[-1] = loss.item()
        for name, p in model.named_parameters():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return torch.tensor(losses), {name: torch.stack(g) for name, g in rows.items()}


def rows_of(model, batch, plan="auto", criterion=EACH, m=M, weights=None, **options):
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), m, plan=plan, **options)
    return grads_of(params, batch, buffers=buffers, sample_weights=weights)


def close(found, expected):
    torch.testing.assert_close(found, expected, equal_nan=True)


# --- Weights ---


@every_plan
@pytest.mark.parametrize("m", [1, 2, 4, 12])
def test_a_row_is_the_weighted_mean_of_its_samples(plan, m):
    model, batch, weights = mlp(), labelled(), some_weights()
    losses, rows = naive_rows(copy.deepcopy(model), batch, weights, [N // m] * m)
    found = rows_of(model, batch, plan, m=m, weights=weights)
    close(found.losses, losses)
    assert found.live.tolist() == [loss == loss for loss in losses.tolist()]
    share = torch.full((m,), 1 / m)
    assert_close(found.combine(share), {n: g.mean(0) for n, g in rows.items()})
    assert_close(found.stacked(), rows)
    close(found.gram(), gf.DenseStack(rows).gram())


@every_plan
def test_the_rows_of_a_filter_heed_the_empty_row(plan):
    model, batch, weights = mlp(), labelled(), some_weights()
    losses, rows = naive_rows(copy.deepcopy(model), batch, weights, [3] * 4)
    found = rows_of(model, batch, plan, weights=weights)
    params = gf.extract(model)[0]
    for update in (gf.mean_rows(), gf.agree_filter(2.0)):
        update = gf.chain(update)
        grads, _, out = update.update(found, update.init(params), params)
        assert_close(grads, {name: g[[0, 2, 3]].mean(0) for name, g in rows.items()})
        assert out["weights"][1] == 0
    close(found.mean_loss(), losses[[0, 2, 3]].mean())


@pytest.mark.parametrize("budget", [0, 0.25])
def test_the_empty_row_is_known_without_a_pass(budget):
    model, batch, weights = mlp(), labelled(), some_weights()
    found = rows_of(model, batch, "fused", weights=weights, memory_budget=budget)
    assert found.live.tolist() == [True, False, True, True]
    assert found.run.state.value == "graph"


@given(st.integers(0, 2**16), st.integers(1, 3), st.floats(1e-3, 1e3))
def test_only_the_ratios_of_weights_count(seed, size, factor):
    torch.manual_seed(seed)
    model, batch, weights = mlp(), labelled(4 * size), torch.rand(4 * size)
    one = rows_of(model, batch, weights=weights).stacked()
    assert_close(rows_of(model, batch, weights=factor * weights).stacked(), one)
    ones = rows_of(model, batch, weights=torch.full((4 * size,), factor)).stacked()
    assert_close(ones, rows_of(model, batch, criterion=F.cross_entropy).stacked())


@every_plan
def test_one_loss_per_sample_is_averaged_without_weights(plan):
    model, batch = mlp(), labelled()
    found = rows_of(model, batch, plan)
    expected = rows_of(model, batch, plan, F.cross_entropy)
    assert_close(found.stacked(), expected.stacked())
    close(found.losses, expected.losses)


@every_plan
def test_a_pure_loss_with_aux(plan):
    def loss(params, batch):
        each = (batch["x"] @ params["w"] - batch["y"]).square()
        return each, {"each": each.detach()}

    params = {"w": torch.randn(6)}
    batch, weights = {"x": torch.randn(N, 6), "y": torch.randn(N)}, some_weights()
    grads_of = gf.microbatch_grads(loss, M, has_aux=True, plan=plan)
    found = grads_of(params, batch, sample_weights=weights)
    each = (batch["x"] @ params["w"] - batch["y"]).square().view(M, 3)
    own = weights.view(M, 3)
    close(found.losses, (own * each).sum(1) / own.sum(1))
    close(found.aux["each"], each)


@every_plan
def test_the_padding_may_have_a_loss_that_is_not_finite(plan):
    model, (x, y), weights = mlp(), labelled(), some_weights()

    def criterion(out, y):
        return EACH(out, y % 3) + torch.where(y > 2, torch.inf, 0.0)

    expected = rows_of(model, (x, y), plan, weights=weights)
    y = torch.where(weights == 0, y + 3, y)
    found = rows_of(model, (x, y), plan, criterion, weights=weights)
    close(found.losses, expected.losses)
    assert_close(found.stacked(), expected.stacked())


@every_plan
def test_dropout_draws_the_same_numbers_again(plan):
    model, batch, weights = Dropped(), vectors(8), torch.rand(8)
    found = rows_of(model, batch, plan, weights=weights)
    params = gf.extract(model)[0]
    assert_close(found.at(params).stacked(), found.stacked())
    close(found.at(params).losses, found.losses)


@every_plan
def test_at_and_along_keep_the_weights(plan):
    model, batch, weights = mlp(), labelled(), some_weights()
    found = rows_of(model, batch, plan, weights=weights)
    params = gf.extract(model)[0]
    near = {name: p + 0.1 for name, p in params.items()}
    moved = copy.deepcopy(model)
    gf.insert(moved, near)
    losses, rows = naive_rows(moved, batch, weights, [3] * 4)
    assert_close(found.at(near).stacked(), rows)
    close(found.at(near).losses, losses)
    steps, own = torch.linspace(-0.5, 0.5, M), found.stacked()
    along = found.along(steps)
    for m in range(M):
        gf.insert(moved, {name: p + steps[m] * own[name][m] for name, p in params.items()})
        losses, rows = naive_rows(moved, batch, weights, [3] * 4)
        close(along.losses[m], losses[m])
        assert_close(
            {n: g[m] for n, g in along.stacked().items()}, {n: g[m] for n, g in rows.items()}
        )


@every_plan
def test_batch_norm_sees_all_samples(plan):
    model, batch = ConvBN(), images(8)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 3.0, 1.0])
    found = rows_of(model, batch, plan, weights=weights)
    plain = rows_of(model, batch, plan)
    for name, buffer in plain.buffers.items():
        close(found.buffers[name], buffer)
    x, y = (t[:2] for t in batch)
    model(x)
    loss = EACH(model(x), y)[0]  # the second sample has no weight
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for name, g in zip(dict(model.named_parameters()), expected, strict=True):
        close(found.stacked()[name][0], g)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Branching(nn.Module):
    """Rows with the label 0 in the first place take another branch."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        hidden = self.body(x)
        return hidden.tanh() if x[0, 0] > 0 else hidden


@pytest.mark.parametrize("plan", ["auto", "fused", "loop"])
def test_checkpoints(plan):
    model, batch, weights = Checkpointed(), labelled(), some_weights()
    losses, rows = naive_rows(copy.deepcopy(model), batch, weights, [3] * 4)
    found = rows_of(model, batch, plan, weights=weights)
    close(found.losses, losses)
    assert_close(found.stacked(), rows)


def test_rows_that_branch():
    model, (x, y), weights = Branching(), labelled(), some_weights()
    x[:, 0] = torch.tensor([1.0, -1.0]).repeat_interleave(6)
    losses, rows = naive_rows(copy.deepcopy(model), (x, y), weights, [3] * 4)
    found = rows_of(model, (x, y), "fused", weights=weights)
    assert len(found.groups) == 2
    close(found.losses, losses)
    assert_close(found.stacked(), rows)


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(plan, dtype):
    model, (x, y), weights = mlp(), labelled(), some_weights()
    model = model.to(dtype)
    found = rows_of(model, (x.to(dtype), y), plan, weights=weights)
    assert found.losses.dtype == dtype
    assert {g.dtype for g in found.stacked().values()} == {dtype}
    _, rows = naive_rows(copy.deepcopy(model), (x.to(dtype), y), weights, [3] * 4)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for name, g in found.stacked().items():
        torch.testing.assert_close(g, rows[name], rtol=tolerance, atol=tolerance)
    mask = weights > 0  # bool and whole numbers are also weights
    for each in (mask, mask.long()):
        again = rows_of(model, (x.to(dtype), y), plan, weights=each).stacked()
        assert_close(again, rows_of(model, (x.to(dtype), y), plan, weights=mask.double()).stacked())


@every_plan
def test_one_number_for_several_samples_is_refused(plan):
    with pytest.raises(ValueError, match=r"loss per sample with sample_weights=.*reduction=\"none"):
        rows_of(mlp(), labelled(), plan, F.cross_entropy, weights=some_weights())
    wrong = lambda out, y: F.mse_loss(out, out.detach() + 1, reduction="none")
    with pytest.raises(ValueError, match=r"found one of shape \(3, 3\)"):
        rows_of(mlp(), labelled(), plan, wrong, weights=some_weights())


def test_a_scalar_is_the_loss_of_a_single_sample():
    model, batch, weights = mlp(), labelled(), some_weights()
    found = rows_of(model, batch, criterion=F.cross_entropy, m=N, weights=weights)
    assert found.live.tolist() == (weights > 0).tolist()
    expected = rows_of(model, batch, criterion=F.cross_entropy, m=N).stacked()
    for name, g in found.stacked().items():
        close(g[weights > 0], expected[name][weights > 0])


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ([1.0] * N, TypeError, "tensor of 12 real numbers, found list"),
        (torch.ones(N, dtype=torch.complex64), TypeError, "found torch.complex64"),
        (torch.ones(N - 1), ValueError, r"shape \(12,\), found \(11,\)"),
        (torch.ones(M, 3), ValueError, r"shape \(12,\), found \(4, 3\)"),
        (torch.linspace(-1, 1, N), ValueError, r">= 0, found -1\.0"),
        (torch.full((N,), torch.nan), ValueError, "found nan"),
        (torch.full((N,), torch.inf), ValueError, "found inf"),
    ],
)
def test_bad_weights_are_refused_before_a_pass(weights, error, text):
    def criterion(out, y):
        raise AssertionError("ran")

    with pytest.raises(error, match=text):
        rows_of(mlp(), labelled(), criterion=criterion, weights=weights)


# --- Batches that M does not divide ---


@every_plan
@pytest.mark.parametrize(("n", "sizes"), [(9, [3, 2, 2, 2]), (7, [2, 2, 2, 1]), (8, [2] * 4)])
def test_uneven_rows_differ_by_one_sample(plan, n, sizes):
    model, batch = mlp(), labelled(n)
    losses, rows = naive_rows(copy.deepcopy(model), batch, torch.ones(n), sizes)
    for criterion in (EACH, F.cross_entropy):
        found = rows_of(model, batch, plan, criterion, uneven=True)
        close(found.losses, losses)
        assert_close(found.stacked(), rows)
        close(found.gram(), gf.DenseStack(rows).gram())
    assert found.explain().startswith("plan" if n % M else "leaf" if plan in PLANS[:2] else "plan")
    near = {name: p + 0.1 for name, p in gf.extract(model)[0].items()}
    gf.insert(model, near)
    assert_close(found.at(near).stacked(), naive_rows(model, batch, torch.ones(n), sizes)[1])


@every_plan
def test_uneven_rows_pass_statistics_on(plan):
    model, (x, y) = ConvBN(), images(10)
    found = rows_of(model, (x, y), plan, criterion=F.cross_entropy, uneven=True)
    parts = slice(3), slice(3, 6), slice(6, 8), slice(8, 10)
    losses = [F.cross_entropy(model(x[part]), y[part]).item() for part in parts]
    close(found.losses, torch.tensor(losses))
    for name, buffer in model.named_buffers():
        close(found.buffers[name], buffer)


@every_plan
def test_uneven_rows_with_weights_and_dropout(plan):
    model, batch, weights = Dropped(), vectors(9), torch.rand(9)
    found = rows_of(model, batch, plan, weights=weights, uneven=True)
    assert len(found) == M
    assert_close(found.at(gf.extract(model)[0]).stacked(), found.stacked())


def test_fewer_samples_than_rows_are_refused():
    with pytest.raises(ValueError, match="one sample per row, found N = 3 samples and M = 4"):
        rows_of(mlp(), labelled(3), uneven=True)


# --- Steps ---


UPDATES = {
    "agreement": lambda: gf.chain(gf.agree_filter(1.2), gf.sgd(0.1)),
    "mean": lambda: gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.sgd(0.1)),
    "sam": lambda: gf.chain(gf.sam_perturb(0.05), gf.mean_rows(), gf.sgd(0.1)),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("n", [12, 10])
def test_steps_of_every_kind_agree(update, n):
    model, batch, weights = mlp(), labelled(n), torch.rand(n)
    weights[:4] = 0  # with 12 samples the first row is empty
    options = {"microbatches": M, "uneven": True}
    loss, chain = gf.model_loss(model, EACH), UPDATES[update]()
    step = gf.train_step(loss, chain, **options)
    state, info = step(step.init(model), batch, sample_weights=weights)
    parts = gf.train_step(loss, chain, rows_at_once=1, **options)
    compiled = gf.compile(step, backend="graph")
    for other in (parts, compiled):
        found, shown = other(step.init(model), batch, sample_weights=weights)
        assert_close(found["params"], state["params"])
        close(shown["loss"], info["loss"])
    if update == "sam":
        return  # Filtered takes a chain without an update rule
    filtering = gf.chain(*list(chain.parts)[:-1])
    for compile in (False, "graph"):
        for scaler in (None, torch.amp.GradScaler("cpu")):
            own = copy.deepcopy(model)
            sgd = torch.optim.SGD(own.parameters(), 0.1)
            filtered = Filtered(
                own, EACH, filtering, sgd, M, uneven=True, compile=compile, scaler=scaler
            )
            result = filtered.step(*batch, sample_weights=weights)
            assert_close(gf.extract(own)[0], state["params"])
            close(result.loss, info["loss"])


@pytest.mark.parametrize("compile", [False, "graph"])
@pytest.mark.parametrize("update", [gf.mean_rows, lambda: gf.agree_filter(2.0)])
def test_accumulated_batches_keep_their_weights(compile, update):
    model, batches = mlp(), [labelled() for _ in range(2)]
    weights = [some_weights(), torch.rand(N)]
    own = copy.deepcopy(model)
    filtered = Filtered(
        own, EACH, gf.chain(update()), torch.optim.SGD(own.parameters(), 0.1), M, compile=compile
    )
    filtered.accumulate(*batches[0], sample_weights=weights[0])
    filtered.step(*batches[1], sample_weights=weights[1])
    rows = [
        naive_rows(copy.deepcopy(model), batch, given, [3] * 4)[1]
        for batch, given in zip(batches, weights, strict=True)
    ]
    for name, p in model.named_parameters():
        mean = torch.cat([part[name] for part in rows]).sum(0) / 7  # of 8, one is empty
        close(own.get_parameter(name).detach(), (p - 0.1 * mean).detach())


def test_auto_keeps_the_fused_plan_after_an_uneven_batch():
    model = mlp()
    filtered = Filtered(
        model, EACH, gf.mean_rows(), torch.optim.SGD(model.parameters(), 0.1), M, uneven=True
    )
    filtered.step(*labelled(9))
    assert filtered._plan == "auto"


@pytest.mark.slow
def test_weights_have_symbolic_sizes_as_their_batch():
    model = mlp()
    step = gf.train_step(gf.model_loss(model, EACH), UPDATES["agreement"](), microbatches=M)
    compiled = gf.compile(step, backend="graph", dynamic=True)
    plain = gf.compile(step, backend="graph", dynamic=True)
    state = step.init(model)
    for n in (8, 12, 20, 24):
        plain(state, labelled(n))
        batch, weights = labelled(n), torch.rand(n)
        found, _ = compiled(state, batch, sample_weights=weights)
        assert_close(found["params"], step(state, batch, sample_weights=weights)[0]["params"])
    traces, without = (sum(map(len, c.graphs.entries.values())) for c in (compiled, plain))
    assert traces == without < 4
