"""All names of one operation: its override handles each of them, or the name is refused."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import _VF, nn

import gradfilter as gf
from _plain import off, plain_rows, side_by_side
from _zoo_case import PLAN

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
aten, M = torch.ops.aten, 3


def tensors(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def ids(_):
    return torch.randint(0, 3, (12, 4), generator=torch.Generator().manual_seed(2))


def data(*shape):
    return lambda _: tensors((12, *shape))[0]


TABLE = dict(zip("w", tensors((7, 3)), strict=True))
GAINS = dict(zip("wb", tensors((6,), (6,)), strict=True))
LAYER = dict(zip("wb", tensors((4, 6), (4,)), strict=True))
KERNEL = dict(zip("wb", tensors((3, 6, 2, 2), (3,)), strict=True))
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
MEAN, VAR = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.linspace(1, 2, 6).double()


def recurrent(name):
    size = RECURRENT[name] * 6
    return dict(zip("abcd", tensors((size, 6), (size, 6), (size,), (size,)), strict=True))


def states(name, *shape):
    h = torch.zeros(shape)
    return (h, h) if name.startswith("lstm") else h


def first(result):
    return result[0] if isinstance(result, tuple) else result


def sequence(name, function):
    tail = (True, 1, 0.0, True, False, True)
    run = lambda p, x: first(function(x, states(name, 1, len(x), 6), [*p.values()], *tail))
    return recurrent(name), data(5, 6), run


def cell(name, function):
    run = lambda p, x: first(function(x, states(name, len(x), 6), *p.values()))
    return recurrent(name.removesuffix("_cell")), data(6), run


def padded(w, i):
    return torch.embedding(w, i, 0)


@functools.cache
def compiled(how):
    if how == "scripted":
        return torch.jit.script(padded)
    return torch.jit.trace(padded, (torch.ones(7, 3), ids(0)))


def in_a_vmap(p, x):
    return torch.func.vmap(lambda row: F.embedding(row, p["w"], 0))(x)


def norm(name, function, shape=(6, 4, 4)):
    return name, GAINS, data(*shape), function


STATIC = (None, None, True, 0.1, 1e-5, False)
GIVEN = (MEAN, VAR, False, 0.1, 1e-5, False)
CASES = {
    "F.embedding": ("embedding", TABLE, ids, lambda p, x: F.embedding(x, p["w"], 0)),
    "torch.embedding": ("embedding", TABLE, ids, lambda p, x: torch.embedding(p["w"], x, 0)),
    "embedding, named": (
        "embedding",
        TABLE,
        ids,
        lambda p, x: torch.embedding(weight=p["w"], indices=x, padding_idx=0),
    ),
    "aten.embedding": ("embedding", TABLE, ids, lambda p, x: aten.embedding(p["w"], x, 0)),
    "aten.embedding.default": (
        "embedding",
        TABLE,
        ids,
        lambda p, x: aten.embedding.default(p["w"], x, 0, True),
    ),
    "without padding": ("embedding", TABLE, ids, lambda p, x: torch.embedding(p["w"], x)),
    "by frequency": ("embedding", TABLE, ids, lambda p, x: torch.embedding(p["w"], x, -1, True)),
    **{
        f"torch.batch_norm {i}": norm(
            "batch_norm", lambda p, x, t=t: torch.batch_norm(x, p["w"], p["b"], *t)
        )
        for i, t in enumerate((STATIC, GIVEN))
    },
    **{
        f"torch.instance_norm {i}": norm(
            "instance_norm" if t is STATIC else "batch_norm",
            lambda p, x, t=t: torch.instance_norm(x, p["w"], p["b"], *t),
        )
        for i, t in enumerate((STATIC, GIVEN))
    },
    "aten.batch_norm": norm("batch_norm", lambda p, x: aten.batch_norm(x, p["w"], p["b"], *STATIC)),
    "torch.native_batch_norm": norm(
        None, lambda p, x: torch.native_batch_norm(x, p["w"], p["b"], *STATIC[:-1])[0]
    ),
    "torch.layer_norm": norm(
        "layer_norm", lambda p, x: torch.layer_norm(x, (6,), p["w"], p["b"]), (5, 6)
    ),
    "aten.layer_norm": norm(
        "layer_norm", lambda p, x: aten.layer_norm(x, (6,), p["w"], p["b"], 0.1, False), (5, 6)
    ),
    "native_layer_norm": norm(
        None, lambda p, x: torch.native_layer_norm(x, (6,), p["w"], p["b"], 1e-5)[0], (5, 6)
    ),
    "torch.group_norm": norm("group_norm", lambda p, x: torch.group_norm(x, 2, p["w"], p["b"])),
    "torch.rms_norm": norm("rms_norm", lambda p, x: torch.rms_norm(x, (6,), p["w"]), (5, 6)),
    "aten.linear": ("linear", LAYER, data(6), lambda p, x: aten.linear(x, p["w"], p["b"])),
    "addmm": (None, LAYER, data(6), lambda p, x: torch.addmm(p["b"], x, p["w"].T)),
    "aten.conv2d": ("conv", KERNEL, data(6, 4, 4), lambda p, x: aten.conv2d(x, p["w"], p["b"])),
    **{
        f"{home} {name}": ("rnn", *sequence(name, function))
        for name in RECURRENT
        for home, function in {
            "_VF": getattr(_VF, name),
            "torch": getattr(torch, name),
            "aten": getattr(aten, name),
            "aten.input": getattr(aten, name).input,
        }.items()
    },
    **{
        f"{home} {name}": ("cell", *cell(name, function))
        for name in (f"{kind}_cell" for kind in RECURRENT)
        for home, function in {"_VF": getattr(_VF, name), "aten": getattr(aten, name)}.items()
    },
    # What vmap itself runs wrongly.
    "select_scatter": (
        None,
        TABLE,
        data(3),
        lambda p, x: torch.select_scatter(p["w"] * x[0], p["w"][0] * x[1], 0, -2),
    ),
    "Tensor.select_scatter": (
        None,
        TABLE,
        data(3),
        lambda p, x: torch.ones(7, 3).select_scatter(p["w"][:, 0] * x[0, 0], 1, 2),
    ),
    "index_fill": (
        None,
        TABLE,
        data(3),
        lambda p, x: torch.ones(4, 3).index_fill(-1, torch.tensor([0, 2]), p["w"][0, 0]) * x,
    ),
    "as_strided": (None, TABLE, data(3), lambda p, x: p["w"].as_strided((4, 3), (4, 1), 1) * x),
    "as_strided_copy": (
        None,
        TABLE,
        data(3),
        lambda p, x: torch.as_strided_copy(p["w"], (4, 3), (4, 1)) * x,
    ),
    "roll": (None, TABLE, data(3), lambda p, x: torch.roll(p["w"][0, 0] * x[0, 0], 1)),
}
BELOW = {  # run by vmap, which masks the padding of the first row alone
    "scripted": (TABLE, ids, lambda p, x: compiled("scripted")(p["w"], x)),
    "traced": (TABLE, ids, lambda p, x: compiled("traced")(p["w"], x)),
    "in a vmap": (TABLE, ids, in_a_vmap),
}
REFUSED = {
    **BELOW,
    "a view with strides": (TABLE, data(3), lambda p, x: p["w"][1:].as_strided((4, 3), (3, 1)) * x),
    "strided in place": (
        TABLE,
        data(3),
        lambda p, x: (p["w"] * 1).as_strided_((4, 3), (3, 1)) * x,
    ),
    "scattered in a vmap": (
        TABLE,
        data(3),
        lambda p, x: torch.func.vmap(lambda row: p["w"].select_scatter(row, 0, 1))(x),
    ),
}


def loss_of(run):
    def loss(p, batch):
        found = run(p, batch[0])
        place = torch.arange(found.numel(), dtype=found.dtype).view(found.shape)
        return (found * torch.cos(place)).sum()

    return loss


def rows(loss, params, x, plan):
    return gf.microbatch_grads(loss, M, plan=plan)(params, (x,))


@pytest.mark.parametrize("plan", [PLAN, "auto"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_right_by_any_name(name, plan):
    rule, params, make, run = CASES[name]
    loss, x = loss_of(run), make(0)
    found = rows(loss, params, x, plan)
    want = plain_rows(loss, params, (x,), M)
    assert off(side_by_side(found.stacked(), params), want) < 1e-12
    assert rule is None or PLAN != "fused" or found.overrides.get(rule)
    assert off(found.gram(), want @ want.T) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.skipif(PLAN != "fused", reason="only the fused plan refuses these")
def test_what_a_rule_cannot_see_is_refused_and_run_by_the_loop(name):
    params, make, run = REFUSED[name]
    loss, x = loss_of(run), make(0)
    plain_rows(loss, params, (x,), M)  # what is traced, is traced outside of any plan
    named = "padding_idx" if name in BELOW else "as_strided|select_scatter"
    with pytest.raises(RuntimeError, match=named):
        rows(loss, params, x, "fused")
    with pytest.warns(UserWarning, match=named):
        found = rows(loss, params, x, "auto")
    want = plain_rows(loss, params, (x,), M)
    assert off(side_by_side(found.stacked(), params), want) < 1e-12


@pytest.mark.parametrize("name", [*CASES, *BELOW])
def test_plan_vmap_is_right_or_refuses(name):
    params, make, run = BELOW[name] if name in BELOW else CASES[name][1:]
    loss, x = loss_of(run), make(0)
    want = plain_rows(loss, params, (x,), M)
    try:
        found = rows(loss, params, x, "vmap")
    except RuntimeError as refusal:
        assert name.split()[-1].startswith(("lstm", "gru", "rnn")), refusal
        return
    assert off(side_by_side(found.stacked(), params), want) < 1e-12


def test_a_scripted_module_is_run_by_the_loop():
    model = nn.Sequential(torch.jit.script(nn.Embedding(7, 3, padding_idx=0)), nn.Linear(3, 5))
    batch = (ids(0), torch.arange(12) % 5)
    criterion = lambda out, y: F.cross_entropy(out.mean(1), y)
    params, _ = gf.extract(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gf.microbatch_grads(gf.model_loss(model, criterion), M)(params, batch).stacked()
    assert any("padding_idx" in str(w.message) for w in caught) or PLAN != "fused"
    plain = lambda p, b: criterion(
        F.linear(F.embedding(b[0], p["0.weight"], 0), *list(p.values())[1:]), b[1]
    )
    assert off(side_by_side(found, params), plain_rows(plain, params, batch, M)) < 1e-12


BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean", "padding_idx": 2},
    "max": {"mode": "max", "padding_idx": 0},
    "weighted": {"mode": "sum", "padding_idx": 1},
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_one_length_run_at_once(name):
    x, (weights,) = ids(0), tensors((12, 4))
    x[1] = x[9] = 2  # bags of nothing but padding
    x[2] = 0

    def run(p, batch):
        own = {"per_sample_weights": batch[1] * p["w"][0, 0]} if name == "weighted" else {}
        return F.embedding_bag(batch[0], p["w"], **BAGS[name], **own)

    loss = lambda p, batch: loss_of(lambda p, _: run(p, batch))(p, batch)
    found = gf.microbatch_grads(loss, M, plan=PLAN)(TABLE, (x, weights))
    want = plain_rows(loss, TABLE, (x, weights), M)
    assert off(side_by_side(found.stacked(), TABLE), want) < 1e-12
    assert PLAN != "fused" or found.overrides["embedding_bag"]
    assert off(found.gram(), want @ want.T) < 1e-12


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_sparse_bags_are_refused_by_name_in_the_forward_pass(plan):
    model = nn.Sequential(nn.EmbeddingBag(7, 6, mode="sum", sparse=True), nn.Linear(6, 5))
    params, _ = gf.extract(model)
    batch, loss = (ids(0), torch.arange(12) % 5), gf.model_loss(model, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"embedding_bag with sparse=True"):
        gf.microbatch_grads(loss, M, plan=plan)(params, batch)
    with pytest.warns(UserWarning, match=r"embedding_bag with sparse=True"):
        found = gf.microbatch_grads(loss, M)(params, batch).stacked()
    dense = lambda p, b: F.cross_entropy(
        F.linear(F.embedding_bag(b[0], p["0.weight"], mode="sum"), p["1.weight"], p["1.bias"]), b[1]
    )
    assert off(side_by_side(found, params), plain_rows(dense, params, batch, M)) < 1e-12
