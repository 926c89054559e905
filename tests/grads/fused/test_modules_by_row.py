"""Modules that cannot run over all rows at once run row by row; all other modules run once."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_row_groups import check, plain_rows, signed
from torch import nn

import gradfilter as gf
from _zoo_case import Net, frozen, inputs, parameter, rows_of, wavy
from _zoo_check import assert_trees_close

pytestmark = pytest.mark.usefixtures("float64")


class Doubled(torch.autograd.Function):
    """A function of the old style, whose gradient is not what autograd would find."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (3 + x.cos())


class NoRule(torch.autograd.Function):
    """A function of the new style, without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0].cos()


def doubled(net, x):
    return Doubled.apply(net.b(x))


class Part(Net):
    """A module of the user's own."""


def model(run, *, whole=lambda net, x: net.c(net.part(net.a(x))), **parts):
    """A model with one part that is run as given."""
    torch.manual_seed(6)
    return Net(
        whole,
        a=nn.Linear(6, 6),
        part=Part(run, **{name: build() for name, build in parts.items()}),
        c=nn.Sequential(nn.Tanh(), nn.Linear(6, 5)),
    )


def routed(net, x):
    """Experts, each for the samples that a gate sends to it."""
    gate = net.gate(x)
    chosen = F.one_hot(gate.argmax(-1), 3).T
    out = torch.zeros_like(x)
    for expert in chosen.sum(1).gt(0).nonzero():
        at = torch.where(chosen[expert[0]])[0]
        out.index_add_(
            0, at, F.linear(x[at], net.weight[expert[0]]) * gate.max(-1).values[at, None]
        )
    return out


def written(net, x):
    net.last.copy_(0.5 * net.last + x.mean(0))
    return net.b(x) * net.last


def assigned(net, x):
    net.last = 0.5 * net.last + x.detach().mean(0)
    net.calls += 1
    return net.b(x) * net.last + net.calls


def with_last(run):
    """A part with a number for each feature, and one for all."""

    def build():
        made = model(run, b=lambda: nn.Linear(6, 6))
        made.part.register_buffer("last", torch.linspace(-1, 1, 6))
        made.part.register_buffer("calls", torch.tensor(3))
        return made

    return build


LINEAR = {"b": lambda: nn.Linear(6, 6)}
CASES = {
    "an old function": lambda: model(lambda net, x: Doubled.apply(net.b(x)), **LINEAR),
    "a function without a rule": lambda: model(lambda net, x: NoRule.apply(net.b(x)), **LINEAR),
    "routing": lambda: model(
        routed, gate=lambda: nn.Linear(6, 3), weight=lambda: parameter(3, 6, 6)
    ),
    "a boolean index": lambda: model(
        lambda net, x: net.b(x) * x[x > 0].mean(), **LINEAR
    ),
    "other numbers": lambda: model(lambda net, x: net.b(x) * x.std().item(), **LINEAR),
    "a buffer written": with_last(written),
    "a buffer assigned": with_last(assigned),
    "batch norm inside": lambda: model(
        lambda net, x: Doubled.apply(net.norm(net.b(x))), norm=lambda: nn.BatchNorm1d(6), **LINEAR
    ),
    "frozen": lambda: frozen(model(lambda net, x: Doubled.apply(net.b(x)), **LINEAR), "part.b.w"),
    "called twice": lambda: model(
        lambda net, x: Doubled.apply(net.b(x)),
        whole=lambda net, x: net.c(net.part(net.part(net.a(x)).tanh())),
        **LINEAR,
    ),
    "its weight used outside": lambda: model(
        lambda net, x: Doubled.apply(net.b(x)),
        whole=lambda net, x: net.c(F.linear(net.part(net.a(x)), net.part.b.weight)),
        **LINEAR,
    ),
    "trees in and out": lambda: model(
        lambda net, x, *, how: {"h": Doubled.apply(net.b(x["x"])) * how[0], "n": 2, "o": (how[1],)},
        whole=lambda net, x: (
            lambda out: net.c(out["h"] * out["n"] + out["o"][0])
        )(net.part({"x": net.a(x)}, how=[x.sum(), x.mean(), "text", None])),
        **LINEAR,
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", CASES)


def buffers_after(net, x, m):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for part in x.tensor_split(m):
            net(part)
    return dict(net.named_buffers())


@pytest.mark.parametrize(("m", "b"), [(2, 3), (5, 2)])
@each_case
def test_every_question_is_answered_as_by_plain_backward_passes(name, m, b):
    net, (x, y) = CASES[name](), signed(6)(m * b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = rows_of(net, (x, y), "fused", m)
    # Plain microbatches hand their buffers on, as the rows do.
    check(rows, plain_rows(net, (x, y), m), m)
    torch.testing.assert_close(rows.buffers, buffers_after(net, x, m))
    assert "forward" not in vars(net.part)
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


@each_case
def test_rows_elsewhere_and_with_parameters_of_their_own(name):
    net, (x, y) = CASES[name](), signed(6)(8)
    params, _ = gf.extract(net)
    rows = rows_of(net, (x, y), "fused", 4)
    own = {name: torch.stack([p * (1 + 0.1 * m) for m in range(4)]) for name, p in params.items()}
    found, state = rows.at_rows(own).stacked(), copy.deepcopy(net)
    for m in range(4):
        gf.insert(state, {name: leaf[m] for name, leaf in own.items()})
        part = x.tensor_split(4)[m], y.tensor_split(4)[m]
        want = plain_rows(state, part, 1)
        with torch.no_grad():
            state(part[0])  # hands its buffers on
        each = {name: leaf[m : m + 1] for name, leaf in found.items()}
        assert_trees_close(each, want, 1e-12, 1e-13, f"row {m}")


def test_what_runs_row_by_row_is_learned_once(capsys):
    calls = itertools.count()  # a list would be a log, from which a probing pass is removed

    def whole(net, x):
        next(calls)
        return net.c(net.part(net.a(x)))

    net, batch = model(doubled, whole=whole, **LINEAR), signed(6)(8)
    params, _ = gf.extract(net)
    grads_of = gf.microbatch_grads(gf.model_loss(net, wavy), 4, plan="fused")
    said = grads_of(params, batch).explain()
    assert "row by row inside the pass: Part" in said and not capsys.readouterr().out
    # A row twice, then a pass that is refused, and then not; then the pass itself.
    assert next(calls) == 2 + 2 + 1
    grads_of(params, batch).gram()
    grads_of(params, batch).gram()
    assert next(calls) == 6 + (2 + 1 + 1) + 1  # the second pass is probed, the third is not
    again = pickle.loads(pickle.dumps(gf.microbatch_grads(F.mse_loss, 4)))
    assert again.plan == "auto"


def test_all_parts_of_a_kind_run_row_by_row_from_the_first_refusal_on():
    calls = itertools.count()  # a list would be a log, from which a probing pass is removed

    def whole(net, x):
        next(calls)
        return net.c(net.second(net.part(net.a(x))))

    net = model(doubled, whole=whole, **LINEAR)
    net.second = Part(doubled, b=nn.Linear(6, 6))
    batch = signed(6)(8)
    rows = rows_of(net, batch, "fused", 4)
    assert next(calls) == 2 + 2 + 1
    check(rows, plain_rows(net, batch, 4), 4)


def test_random_numbers_inside_are_those_of_the_first_pass():
    net = model(lambda net, x: Doubled.apply(F.dropout(net.b(x), 0.4)), **LINEAR)
    batch = signed(6)(8)
    params, _ = gf.extract(net)
    rows = rows_of(net, batch, "fused", 4)
    combined, stacked = rows.combine(torch.ones(4)), rows.stacked()
    assert_trees_close(combined, {n: leaf.sum(0) for n, leaf in stacked.items()}, 1e-12, 1e-13, "")
    assert_trees_close(rows.at(params).stacked(), stacked, 1e-12, 1e-13, "at")


def test_groups_and_parts_by_row_go_together():
    def whole(net, x):
        h = net.part(net.a(x))
        return net.c(h.tanh() if x[0, 0] > 0 else h)

    net, batch = model(doubled, whole=whole, **LINEAR), signed(6)(7)
    rows = rows_of(net, batch, "fused", 7)
    assert len(rows.groups) == 2
    check(rows, plain_rows(net, batch, 7), 7)


def changes_a_list(net, xs):
    xs.append(xs[0])
    return Doubled.apply(net.b(xs[0]))


REFUSED = {
    "a container changed": (
        changes_a_list,
        lambda net, x: net.c(net.part([net.a(x)])),
        "changes the containers",
    ),
    "an object": (
        lambda net, x, box: Doubled.apply(net.b(x)),
        lambda net, x: net.c(net.part(net.a(x), iter(()))),
        "is given or returns tuple_iterator",
    ),
    "several shapes": (
        lambda net, x: Doubled.apply(net.b(x))[:, : 1 + int(1e6 * x[0, 0].abs()) % 5],
        lambda net, x: net.c(net.part(net.a(x)).sum(1, keepdim=True).expand(-1, 6)),
        "returns tensors of several shapes",
    ),
    "several numbers": (
        lambda net, x: (Doubled.apply(net.b(x)), x.sum().item()),
        lambda net, x: net.c(net.part(net.a(x))[0]),
        "Python values that differ",
    ),
    "a shared tensor written": (
        lambda net, x, n: Doubled.apply(net.b(x)) * n.add_(1),
        lambda net, x: net.c(net.part(net.a(x), torch.zeros(6))),
        "writes into a tensor that all rows share",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_row_by_row_is_refused_by_name(name):
    run, whole, named = REFUSED[name]
    net, batch = model(run, whole=whole, **LINEAR), signed(6)(8)
    with pytest.raises(RuntimeError, match=named):
        rows_of(net, batch, "fused", 4)
    with pytest.warns(UserWarning, match="Fell back"):
        rows = rows_of(net, batch, "auto", 4)
    check(rows, plain_rows(net, batch, 4), 4)
    assert "forward" not in vars(net.part)


@pytest.mark.parametrize("twice", [True, False])
def test_a_buffer_that_is_used_more_than_once_in_a_pass_is_not_handed_on(twice):
    net = with_last(written)()
    if twice:
        net.run = lambda net, x: net.c(net.part(net.part(net.a(x))))
    else:
        net.run = lambda net, x: net.c(net.part(net.a(x)) * net.part.last)
    with pytest.raises(RuntimeError, match=r"more than once|and also reads"):
        rows_of(net, signed(6)(8), "fused", 4)


def test_what_reaches_a_part_by_another_way_is_refused():
    def whole(net, x):
        h = net.a(x)
        net.part.aside = h
        return net.c(net.part(h))

    net = model(lambda net, x: Doubled.apply(net.b(x)) + net.aside, whole=whole, **LINEAR)
    net.part.aside = None
    with pytest.raises(RuntimeError):
        rows_of(net, signed(6)(8), "fused", 4)


def test_a_row_gone_bad_stays_out_of_the_others():
    net, (x, y) = CASES["an old function"](), inputs(6)(8)
    x[5, 2] = float("nan")
    want = plain_rows(net, (x, y), 8)
    good = torch.arange(8) != 5
    weights = good * torch.linspace(-0.7, 1.3, 8)
    rows = rows_of(net, (x, y), "fused", 8)
    combined = {n: torch.tensordot(weights[good], leaf[good], 1) for n, leaf in want.items()}
    assert_trees_close(rows.combine(weights), combined, 1e-12, 1e-13, "combine")


def test_a_part_that_is_most_of_the_model_is_left_to_the_loop():
    net = Net(lambda net, x: net.part(x), part=Part(doubled, b=nn.Linear(6, 6)))
    with pytest.raises(RuntimeError, match="setup_context"):
        rows_of(net, signed(6)(8), "fused", 4)


def looked_up(net, ids):
    """Padding is masked in every row, and what vmap runs wrongly is right here."""
    found = Doubled.apply(net.embed(ids) + torch.embedding(net.embed.weight, ids, 1))
    return found.select_scatter(net.embed.weight[:1] * found[:, 0], 1, 1)


@pytest.mark.parametrize("padding", [0, -2])
def test_padding_is_masked_in_every_row_of_a_part(padding):
    part = Part(looked_up, embed=nn.Embedding(5, 4, padding_idx=padding))
    net = Net(lambda net, ids: net.c(net.part(ids)), part=part, a=nn.Linear(4, 4))
    net.c, net.d, net.e = nn.Linear(4, 3), nn.Tanh(), nn.Tanh()
    batch = torch.randint(0, 5, (12, 4)), torch.arange(12) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = rows_of(net, batch, "auto")
    want = plain_rows(net, batch, 3)
    for name, leaf in rows.stacked().items():
        torch.testing.assert_close(leaf, want[name], rtol=1e-10, atol=1e-12)


class OldFunction(torch.autograd.Function):
    """A function of the old form, without setup_context, which vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class WithOldFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return OldFunction.apply(self.inner(x))


def test_rows_at_their_own_points_stay_in_the_pass():
    """The values of a row's own parameters are computed while vmap has been left already."""
    torch.manual_seed(0)
    model = nn.Sequential(WithOldFunction(), nn.Linear(6, 3), nn.Linear(3, 3)).double()
    batch = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    steps = torch.tensor([0.1, -0.2], dtype=torch.float64)
    loss, params = gf.model_loss(model, nn.functional.mse_loss), gf.extract(model)[0]
    found, expected = (
        gf.microbatch_grads(loss, 2, plan=plan)(params, batch).along(steps).stacked()
        for plan in ("fused", "loop")
    )
    torch.testing.assert_close(found, expected)
