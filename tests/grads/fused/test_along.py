"""Every row at w + c_m g_m: equal to ordinary passes at those points, under every plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _compiled import check_compiled
from _plain import module_rows
from gradfilter.grads._joined_stacks import choose, join

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # vmap has no rule for a kernel of attention, and torch.jit is deprecated.
    pytest.mark.filterwarnings("ignore"),
]
COUNT, CLASSES = 12, 4


class Text(nn.Module):
    """An embedding with padding, an LSTM and a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 5, padding_idx=0), nn.LSTM(5, 6, batch_first=True)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, ids):
        return self.out(self.norm(self.rnn(self.embed(ids))[0])[:, -1])


class TiedTransformer(nn.Module):
    """A transformer layer whose embedding is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, ids):
        return F.linear(self.layer(self.embed(ids)), self.embed.weight).mean(1)


class Bag(nn.Module):
    """A bag of words with a small table, which is held, and weights of the words."""

    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 6, mode="sum"), nn.Linear(6, CLASSES)
        self.weights = nn.Parameter(torch.rand(7))

    def forward(self, ids):
        return self.out(self.bag(ids, per_sample_weights=self.weights.expand(ids.shape)))


class Cells(nn.Module):
    """A GRU cell with a learned first state."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 5), nn.Linear(5, CLASSES)
        self.start = nn.Parameter(torch.randn(1, 5))

    def forward(self, x):
        h = self.start.expand(len(x), 5)
        for _ in range(2):
            h = self.cell(x, h)
        return self.out(h)


class Queries(nn.Module):
    """Attention with learned queries and separate weights, and a weight-normalised layer."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES))

    def forward(self, x):
        keys = x[:, None, :] + self.query
        queries = self.query.expand(len(x), 1, 6)
        return self.out(self.attention(queries, keys, keys)[0][:, 0])


class Twice(nn.Module):
    """A weight used twice, once through its transpose, and one that only a penalty uses."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(F.linear(h, self.first.weight.t()) + self.first.weight.detach().sum())
        return self.out(h) * (1 + self.scale.square().mean())


class Rounded(torch.autograd.Function):
    """A straight-through estimator, which torch hands around the overrides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight):
        return weight.round(decimals=2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Quantized(nn.Linear):
    def forward(self, x):
        return F.linear(x, Rounded.apply(self.weight), self.bias)


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ weight)


class Hidden(nn.Module):
    """Parameters used in a scripted function, and inside a transform of the loss's own."""

    def __init__(self):
        super().__init__()
        self.out, self.weight = nn.Linear(6, CLASSES), nn.Parameter(torch.randn(6, 6))
        self.inner = nn.Parameter(torch.randn(6, CLASSES))

    def forward(self, x):
        slope = torch.func.grad(lambda w: (x @ w).square().mean())(self.inner)
        return self.out(scripted(x, self.weight)) + slope.sum(0)


class Stepwise(nn.Module):
    """A part that runs row by row, because it asks for the numbers of every row."""

    class Route(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x):
            chosen = x[:, 0] > 0
            out = torch.zeros_like(x)
            for k, expert in enumerate(self.experts):
                (places,) = torch.where(chosen == bool(k))
                out = out.index_add(0, places, expert(x[places]))
            return out

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.route, self.out = self.Route(), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(self.route(self.before(x)))


class Asking(nn.Module):
    """Rows answer the host differently, and run in groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(self.a(x) if x.sum() > 0 else self.b(x).tanh())


def vectors():
    return torch.randn(COUNT, 6)


def images():
    return torch.randn(COUNT, 2, 7, 7)


def ids():
    return torch.randint(0, 11, (COUNT, 7))


def wide():
    return torch.randn(COUNT, 9, 6)


MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)), vectors),
    "no bias": (lambda: nn.Linear(6, CLASSES, bias=False), vectors),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(45, CLASSES)),
        wide,
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        ),
        images,
    ),
    "deconv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.GroupNorm(1, 3),
            nn.Tanh(),
            nn.ConvTranspose2d(3, 2, 3, stride=2),
            nn.Flatten(),
            nn.Linear(242, CLASSES),
        ),
        images,
    ),
    "text": (Text, ids),
    "tied": (TiedTransformer, ids),
    "bag": (Bag, ids),
    "cells": (Cells, vectors),
    "queries": (Queries, vectors),
    "twice": (Twice, vectors),
    "quantized": (lambda: nn.Sequential(nn.Linear(6, 6), Quantized(6, CLASSES)), vectors),
    "hidden": (Hidden, vectors),
    "stepwise": (Stepwise, vectors),
    "asking": (Asking, vectors),
}


def made(name):
    torch.manual_seed(0)
    build, draw = MODELS[name]
    return build(), (draw(), torch.arange(COUNT) % CLASSES)


def ordinary_rows(model, batch, m, factors, names=None, weights=None):
    """Run an ordinary pass for every row, move the parameters along it, and run another there."""
    losses, rows = [], []
    carried = copy.deepcopy(model)
    for k, part in enumerate(zip(*(t.chunk(m) for t in batch), strict=True)):
        own, here = copy.deepcopy(carried), 1.0 if weights is None else weights[k]
        loss = F.cross_entropy(own(part[0]), part[1])
        params = dict(own.named_parameters())
        grads = torch.autograd.grad(loss, params.values(), materialize_grads=True)
        buffers = dict(own.named_buffers())
        with torch.no_grad():
            for name, buffer in carried.named_buffers():
                after = buffers[name].clone()
                buffers[name].copy_(buffer)
                buffer.copy_(after)
            for (name, p), g in zip(params.items(), grads, strict=True):
                if names is None or name in names:
                    p.add_(factors[k] * here * g)
        loss, found = module_rows(own, F.cross_entropy, part, 1)
        losses.append(loss)
        rows.append({name: here * leaf for name, leaf in found.items()})
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return torch.cat(losses), joined


FACTORS = torch.linspace(0.1, 0.7, COUNT, dtype=torch.float64)


def computed(model, batch, m, plan, **options):
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    if m == COUNT:
        return gf.per_sample_grads(loss, plan=plan, **options)(params, batch, buffers=buffers)
    return gf.microbatch_grads(loss, m, plan=plan, **options)(params, batch, buffers=buffers)


def check(rows, losses, expected):
    torch.testing.assert_close(rows.losses, losses, rtol=1e-10, atol=1e-12)
    found = rows.stacked()
    weights = torch.linspace(-1, 1, len(rows))
    total = rows.combine(weights)
    for name, leaf in expected.items():
        if name in found:
            torch.testing.assert_close(found[name], leaf, rtol=1e-10, atol=1e-12)
            mean = torch.tensordot(weights, leaf, 1)
            torch.testing.assert_close(total[name], mean, rtol=1e-10, atol=1e-12)
    matrix = torch.cat([expected[name].flatten(1) for name in found], 1)
    torch.testing.assert_close(rows.gram(), matrix @ matrix.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows.sq_norms(), matrix.square().sum(1), rtol=1e-9, atol=1e-12)


# BatchNorm has no statistics of a row of one sample.
SIZES = [(name, m) for name in MODELS for m in (1, 4, COUNT) if (name, m) != ("conv", COUNT)]
NO_VMAP = ("text", "cells", "stepwise", "asking")
"""Models that torch.func.vmap itself does not support: recurrent kernels, questions to the host."""


@pytest.mark.parametrize("plan", ["auto", "loop", "vmap"])
@pytest.mark.parametrize(("name", "m"), SIZES)
def test_rows_are_those_of_ordinary_passes(name, m, plan):
    model, batch = made(name)
    losses, expected = ordinary_rows(model, batch, m, FACTORS[:m])
    if plan == "vmap" and name in NO_VMAP:
        with pytest.raises(RuntimeError):
            computed(model, batch, m, plan)
    else:
        check(computed(model, batch, m, plan).along(FACTORS[:m]), losses, expected)


@pytest.mark.parametrize("budget", [0, 0.25])
@pytest.mark.parametrize("name", ["MLP", "conv", "text", "tied", "sequences"])
def test_other_modes_scaled_columns_and_first(name, budget):
    model, batch = made(name)
    names = [key for key, _ in model.named_parameters()][::2]
    weights = torch.tensor([1.5, 0.5, 2.0, 1.0])
    losses, expected = ordinary_rows(model, batch, 4, FACTORS, names, weights)
    rows = computed(model, batch, 4, "fused", memory_budget=budget)
    rows.gram()
    moved = rows.scaled(weights).columns(names).first(3).along(FACTORS[:3])
    check(moved, losses[:3], {key: leaf[:3] for key, leaf in expected.items() if key in names})
    moved.release()
    check(moved, losses[:3], {key: leaf[:3] for key, leaf in expected.items() if key in names})


@pytest.mark.parametrize("name", ["MLP", "tied", "twice"])
def test_joined_and_selected_stacks(name):
    model, batch = made(name)
    names = [key for key, _ in model.named_parameters()]
    rows = computed(model, batch, 4, "auto")
    ones = torch.ones(4)
    joined = join(rows.columns(names[::2]), rows.columns(names[1::2]))
    check(joined.along(FACTORS[:4]), *ordinary_rows(model, batch, 4, FACTORS))
    apart = join(rows.columns(names[:1]).scaled(2 * ones), rows.columns(names[1:]))
    params = dict(model.named_parameters())
    near = {
        key: params[key] + FACTORS[:4].view(-1, *[1] * params[key].ndim) * leaf
        for key, leaf in apart.stacked().items()
    }
    want = apart.at_rows({key: p.detach() for key, p in near.items()}).stacked()
    torch.testing.assert_close(apart.along(FACTORS[:4]).stacked(), want)
    selected = choose(torch.tensor(True), rows, rows.scaled(2 * ones))
    check(selected.along(FACTORS[:4]), *ordinary_rows(model, batch, 4, FACTORS))
    nested = choose(torch.tensor(False), rows, rows.scaled(ones)).along(FACTORS[:4])
    check(nested, *ordinary_rows(model, batch, 4, FACTORS))


def test_along_again_and_at_from_there():
    """A stack at points of its own is moved from those points."""
    model, batch = made("MLP")
    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = computed(model, batch, 4, "fused")
    first = rows.along(FACTORS[:4])
    points = {
        name: params[name] + FACTORS[:4].view(-1, *[1] * params[name].ndim) * leaf
        for name, leaf in rows.stacked().items()
    }
    onward = {
        name: points[name] + 0.3 * leaf for name, leaf in rows.at_rows(points).stacked().items()
    }
    want = rows.at_rows(onward).stacked()
    torch.testing.assert_close(first.along(torch.full((4,), 0.3)).stacked(), want)
    torch.testing.assert_close(first.at_rows(onward).stacked(), want)
    torch.testing.assert_close(first.at(params).stacked(), rows.stacked())
    some = {"0.weight": params["0.weight"]}
    back = rows.at_rows({**points, "0.weight": params["0.weight"].expand(4, -1, -1)})
    torch.testing.assert_close(first.at(some).stacked(), back.stacked())


@pytest.mark.parametrize("m", [4, COUNT])
def test_dropout_draws_the_same_masks(m):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, CLASSES))
    batch = (vectors(), torch.arange(COUNT) % CLASSES)
    rows = computed(model, batch, m, "fused")
    torch.testing.assert_close(rows.along(torch.zeros(m)).losses, rows.losses)
    params, _ = gf.extract(model)
    near = {
        name: params[name] + FACTORS[:m].view(-1, *[1] * params[name].ndim) * leaf
        for name, leaf in rows.stacked().items()
    }
    want = rows.at_rows(near)
    check(rows.along(FACTORS[:m]), want.losses, want.stacked())


def test_hooks_on_parameters_change_the_direction_and_the_result():
    model, batch = made("MLP")
    model[0].weight.register_hook(lambda g: g * torch.arange(6.0))
    rows = computed(model, batch, 4, "auto")
    want = computed(model, batch, 4, "loop").along(FACTORS[:4])
    check(rows.along(FACTORS[:4]), want.losses, want.stacked())


def test_a_row_of_numbers_that_are_not_finite_does_not_reach_the_others():
    model, batch = made("MLP")
    losses, expected = ordinary_rows(model, batch, 4, FACTORS)
    bad = batch[0].clone()
    bad[3] = torch.inf  # the second row
    rows = computed(model, (bad, batch[1]), 4, "fused").along(FACTORS[:4])
    assert not rows.losses[1].isfinite()
    good = [0, 2, 3]
    torch.testing.assert_close(rows.losses[good], losses[good])
    for name, leaf in rows.stacked().items():
        torch.testing.assert_close(leaf[good], expected[name][good])


@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_parameters_that_were_written_since_are_refused(plan):
    model, batch = made("MLP")
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 4, plan=plan)(params, batch, buffers=buffers)
    rows.gram()
    params["0.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight'"):
        rows.along(FACTORS[:4])


def test_what_cannot_be_answered_is_an_error():
    rows = gf.DenseStack({"w": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="cannot answer `along`"):
        rows.along(torch.ones(2))
    model, batch = made("MLP")
    with pytest.raises(ValueError, match="factor"):
        computed(model, batch, 4, "fused").along(torch.ones(3))


def test_no_set_of_weights_is_computed_for_products_and_lookups():
    """`explain()` names the leaves for which M values were computed: here the biases alone."""
    model, batch = made("MLP")
    rows = computed(model, batch, COUNT, "fused").along(FACTORS)
    assert rows.explain().splitlines()[-1] == "values computed for every row: 0.bias, 2.bias"
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(500, 32), nn.Flatten(), nn.Linear(224, CLASSES, bias=False))
    batch = torch.randint(0, 500, (COUNT, 7)), torch.arange(COUNT) % CLASSES
    rows = computed(table, batch, COUNT, "fused").along(FACTORS)
    check(rows, *ordinary_rows(table, batch, COUNT, FACTORS))
    assert "every row" not in rows.explain()


HALF = [
    (name, dtype, autocast)
    for name in ("MLP", "sequences", "tied", "bag")
    for dtype in (torch.bfloat16, torch.float16)
    for autocast in (False, True)
]


@pytest.mark.parametrize(
    ("name", "dtype", "autocast"),
    [*HALF, *((name, torch.float32, False) for name in ("MLP", "sequences", "tied", "text"))],
)
def test_lower_precision_is_as_near_to_float64_as_the_loop(name, dtype, autocast):
    model, batch = made(name)
    factors = FACTORS[:4] * 0.1
    _, expected = ordinary_rows(model, batch, 4, factors)
    wanted = torch.cat([leaf.flatten(1) for leaf in expected.values()], 1)
    model = model.to(torch.float32 if autocast else dtype)
    inputs = (
        batch[0] if batch[0].dtype == torch.int64 else batch[0].to(next(model.parameters()).dtype)
    )
    errors = {}
    for plan in ("auto", "loop"):
        with torch.autocast("cpu", dtype, enabled=autocast):
            rows = computed(model, (inputs, batch[1]), 4, plan).along(factors)
            found = rows.stacked()
        matrix = torch.cat([found[key].double().flatten(1) for key in expected], 1)
        errors[plan] = ((matrix - wanted).norm() / wanted.norm()).item()
    # The loop rounds the moved weights; a rounding of each of a few operations is the rest.
    assert errors["auto"] <= 2 * errors["loop"] + 4 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("m", [4, COUNT])
def test_a_compiled_step_is_the_step(m):
    model, batch = made("MLP")
    check_compiled(model, F.cross_entropy, batch, m, gf.sam_perturb(0.1, per_microbatch=True))
