"""Adam with the squares of single rows: against formulas in float64 on plain backward passes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, normal, normal_tree, unflat, zeros

pytestmark = pytest.mark.usefixtures("float64")
LR = gs.cosine(0.1, 20, warmup_steps=2)


class Naive:
    """The rule on a list of rows, coordinate by coordinate."""

    def __init__(self, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, {}, {}

    def step(self, params, rows, weights, grads=None):
        """Change the parameters; ``rows`` is a list of gradients by name, ``weights`` of floats."""
        self.t += 1
        b1, b2 = self.betas
        lr = self.lr(self.t - 1).item() if callable(self.lr) else self.lr
        for name, p in params.items():
            g = sum(w * row[name] for w, row in zip(weights, rows, strict=True))
            g = g if grads is None else grads[name]
            squares = sum(w * row[name] ** 2 for w, row in zip(weights, rows, strict=True))
            self.m[name] = b1 * self.m.get(name, torch.zeros_like(p)) + (1 - b1) * g
            self.v[name] = b2 * self.v.get(name, torch.zeros_like(p)) + (1 - b2) * squares
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            p.data = p - lr * self.decay * p - lr * m / (v.sqrt() + self.eps)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def plain_rows(model, batch, m):
    """Return the gradients of the microbatches by ``loss.backward()``."""
    rows = []
    for x, y in zip(*(t.chunk(m) for t in batch), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return rows


OPTIONS = {
    "plain": {"lr": 0.1},
    "all": {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    "schedule": {"lr": LR, "betas": (0.0, 0.5)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("m", [1, 4, 12])
@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_training_is_that_of_the_formula(options, m, plan):
    options, model = OPTIONS[options], mlp()
    own, naive = copy.deepcopy(model), Naive(**options)
    step = gf.train_step(
        gf.model_loss(model, F.cross_entropy),
        gf.chain(gf.per_example_adam(**options)),
        microbatches=m,
        plan=plan,
    )
    state = step.init(model)
    for _ in range(5):
        batch = torch.randn(12, 6), torch.randint(3, (12,))
        naive.step(dict(own.named_parameters()), plain_rows(own, batch, m), [1 / m] * m)
        state, info = step(state, batch)
        for name, p in own.named_parameters():
            torch.testing.assert_close(state["params"][name], p.detach(), rtol=1e-7, atol=1e-9)
    assert info.keys() == {"loss", "keep", "per_example_adam/lr"}


@given(st.integers(0, 2**16), st.integers(1, 5))
def test_a_chain_behind_a_reducer_uses_its_rows_and_weights(seed, m):
    rows, params = unflat(normal(m, 15, seed=seed)), normal_tree(seed + 1)
    parts = [{name: g[i] for name, g in rows.items()} for i in range(m)]
    share = normal(m, seed=seed + 2).softmax(0)
    given = gf.chain(gf.aggregate(lambda gram: share), gf.per_example_adam(0.1))
    own, naive, state = dict(params), Naive(), given.init(params)
    for _ in range(3):
        expected = {name: p.clone() for name, p in own.items()}
        naive.step(expected, parts, share.tolist())
        own, state, _ = given(own, state, rows)
        assert_close(own, expected)


def test_transforms_in_between_change_the_gradient_alone():
    rows, params = unflat(normal(3, 15)), normal_tree(1)
    update = gf.chain(gf.mean_rows(), gf.agc_clip(0.01), gf.per_example_adam(0.1))
    clip = gf.chain(gf.mean_rows(), gf.agc_clip(0.01))
    grads, _, _ = clip.update(rows, clip.init(params), params)
    expected = {name: p.clone() for name, p in params.items()}
    parts = [{name: g[i] for name, g in rows.items()} for i in range(3)]
    Naive().step(expected, parts, [1 / 3] * 3, grads)
    assert_close(update(params, update.init(params), rows)[0], expected)


@given(st.integers(0, 2**16), st.integers(1, 4), st.floats(0, 0.5))
def test_with_equal_rows_it_is_adamw(seed, m, decay):
    row, params = normal_tree(seed), normal_tree(seed + 1)
    rows = {name: g.expand(m, *g.shape) for name, g in row.items()}
    one, two = gf.per_example_adam(0.1, weight_decay=decay), gf.adamw(0.1, weight_decay=decay)
    a, b, p, q = one.init(params), two.init(params), params, params
    for _ in range(3):
        p, a, _ = one(p, a, gf.DenseStack(rows))
        q, b, _ = two(q, b, row)
    for name, leaf in p.items():
        torch.testing.assert_close(leaf, q[name], rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**16), st.integers(2, 5))
def test_no_first_step_is_larger_than_that_of_adam(seed, m):
    rows, params = unflat(normal(m, 15, seed=seed)), zeros()
    mean = {name: g.mean(0) for name, g in rows.items()}
    one, two = gf.per_example_adam(0.1), gf.adamw(0.1)
    own, adam = (
        one(params, one.init(params), gf.DenseStack(rows))[0],
        two(params, two.init(params), mean)[0],
    )
    assert all((own[name].abs() <= adam[name].abs() + 1e-12).all() for name in own)


def test_dead_and_bad_rows():
    rows = {"w": torch.tensor([[1.0, 3.0], [torch.nan, 0.0], [1.0, -1.0]])}
    params = {"w": torch.zeros(2)}
    alone = gf.per_example_adam(0.1)
    expected = alone(params, alone.init(params), gf.DenseStack({"w": rows["w"][[0, 2]]}))[0]
    for update in (
        gf.chain(gf.finite_filter(), alone),
        gf.chain(gf.finite_filter(), gf.mean_rows(), alone),
        gf.chain(gf.finite_filter(), gf.agree_filter(2.0), alone),
    ):
        assert_close(update(params, update.init(params), gf.DenseStack(rows))[0], expected)
    assert alone(params, alone.init(params), gf.DenseStack(rows))[0]["w"].isnan().tolist() == [
        True,
        False,
    ]
    dead = gf.DenseStack(rows).scaled(torch.tensor([1.0, 0.0, 1.0]))
    assert_close(alone(params, alone.init(params), dead)[0], expected)
    nothing = gf.DenseStack(rows).scaled(torch.zeros(3))
    assert_close(alone(params, alone.init(params), nothing)[0], params)


def test_zero_gradients_do_not_move():
    params, update = normal_tree(), gf.per_example_adam(0.1)
    rows = gf.DenseStack({name: torch.zeros(3, *p.shape) for name, p in params.items()})
    assert_close(update(params, update.init(params), rows)[0], params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_squares_do_not_underflow(dtype):
    params = {"w": torch.zeros(2, dtype=dtype)}
    rows = {"w": torch.tensor([[2e-4, 1.0], [2e-4, 3.0]]).to(dtype)}
    update = gf.per_example_adam(0.125, eps=0.0)
    new, state, _ = update(params, update.init(params), gf.DenseStack(rows))
    assert new["w"].dtype == dtype and state["m"]["w"].dtype == dtype
    assert state["v"]["w"].dtype == torch.float32 and (state["v"]["w"] > 0).all()
    expected = torch.tensor([-0.125, -0.125 * 2 / 5**0.5])
    torch.testing.assert_close(new["w"].double(), expected, rtol=1e-2, atol=1e-3)


def test_a_skipped_step_changes_no_bit():
    rows, params = unflat(normal(3, 15)), normal_tree(1)
    update = gf.chain(gf.clip_per_row(1.0), gf.per_example_adam(LR))
    params, state, _ = update(params, update.init(params), rows)
    after, kept, info = update(params, state, rows, keep=torch.tensor(False))
    assert not info["keep"]
    assert all(torch.equal(after[name], params[name]) for name in params)
    own, old = kept["per_example_adam"], state["per_example_adam"]
    assert torch.equal(own["count"], old["count"])
    for moment in ("m", "v"):
        assert all(torch.equal(own[moment][name], old[moment][name]) for name in params)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("link", [gf.mean_rows, None])
def test_rows_in_parts(at_once, link):
    model = mlp()
    chain = gf.chain(
        gf.clip_per_row(0.5), *([] if link is None else [link()]), gf.per_example_adam()
    )
    loss, batch = gf.model_loss(model, F.cross_entropy), (torch.randn(12, 6), torch.arange(12) % 3)
    whole = gf.train_step(loss, chain, microbatches=6)
    parts = gf.train_step(loss, chain, microbatches=6, rows_at_once=at_once)
    a, b = whole.init(model), parts.init(model)
    for _ in range(2):
        (a, _), (b, _) = whole(a, batch), parts(b, batch)
    for name, p in a["params"].items():
        torch.testing.assert_close(b["params"][name], p, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chain", ["rows", "reducer"])
def test_a_compiled_step(chain):
    model, rule = mlp(), gf.per_example_adam(LR, weight_decay=0.1)
    update = (
        gf.chain(gf.clip_per_row(0.5), rule)
        if chain == "rows"
        else gf.chain(gf.agree_filter(1.2), rule)
    )
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=4)
    compiled = gf.compile(step, backend="graph")
    a = b = step.init(model)
    for _ in range(3):
        batch = torch.randn(12, 6), torch.randint(3, (12,))
        (a, info), (b, shown) = step(a, batch), compiled(b, batch)
        for name, p in a["params"].items():
            torch.testing.assert_close(b["params"][name], p, rtol=1e-9, atol=1e-12)
        assert info.keys() == shown.keys()


def test_the_squares_take_no_second_pass():
    model, calls = mlp(), []

    def criterion(out, y):
        calls.append(1)
        return F.cross_entropy(out, y)

    step = gf.train_step(
        gf.model_loss(model, criterion),
        gf.chain(gf.per_example_adam()),
        microbatches=4,
        plan="fused",
    )
    state, batch, counts = step.init(model), (torch.randn(12, 6), torch.arange(12) % 3), []
    for _ in range(7):
        calls.clear()
        state, _ = step(state, batch)
        counts.append(len(calls))
    assert min(counts) == 1  # some passes run twice, to find a hidden state


def test_what_is_refused():
    params, update = {"w": torch.zeros(2)}, gf.per_example_adam(0.1)
    with pytest.raises(ValueError, match=r"found a gradient alone.*behind a reducer"):
        update(params, update.init(params), {"w": torch.zeros(2)})
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="per_example_adam: expected"):
            gf.per_example_adam(**wrong)
