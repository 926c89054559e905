"""Losses that read Python values of their rows: one pass for each group of equal values."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _zoo_case import Net, inputs, parameter, rows_of, tokens, wavy
from _zoo_check import assert_trees_close
from gradfilter.grads.fused._row_groups import MOST_GROUPS

pytestmark = pytest.mark.usefixtures("float64")


def plain_rows(model, batch, m, criterion=wavy):
    """Ordinary backward passes, one per microbatch, over the plain module."""
    model = copy.deepcopy(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in params}
    for i in range(m):
        part = [t.tensor_split(m)[i] for t in batch]
        model.zero_grad()
        criterion(model(*part[:-1]), part[-1]).backward()
        for name, p in params.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for buffer in model.buffers():
            buffer.detach_()
    return {name: torch.stack(row) for name, row in rows.items()}


def check(rows, want, m):
    """Every question, against rows made one by one."""
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    weights = torch.linspace(-0.7, 1.3, m)
    tree = {name: torch.randn(leaf.shape[1:]) for name, leaf in want.items()}
    line = torch.cat([leaf.flatten() for leaf in tree.values()])
    combined = {name: torch.tensordot(weights, leaf, 1) for name, leaf in want.items()}
    masked = torch.where(torch.arange(m) == 0, 0.0, weights)
    without = {name: torch.tensordot(masked, leaf, 1) for name, leaf in want.items()}
    assert_trees_close(rows.combine(weights), combined, 1e-12, 1e-13, "combine")
    torch.testing.assert_close(rows.gram(), flat @ flat.T)
    torch.testing.assert_close(rows.sq_norms(), flat.square().sum(1))
    torch.testing.assert_close(rows.dot(tree), flat @ line)
    assert_trees_close(rows.combine(masked), without, 1e-12, 1e-13, "combine without a row")
    assert_trees_close(rows.stacked(), want, 1e-12, 1e-13, "stacked")


def signed(*shape):
    """Inputs of which the first two numbers have known signs, not the same from row to row."""

    def batch(n):
        x, y = inputs(*shape)(n)
        numbers = x.view(n, -1)
        for place, signs in enumerate(([1, -1, 1, -1, -1, 1, 1], [1, -1, -1, 1, 1, -1, 1])):
            sign = torch.tensor(signs)[torch.arange(n) % 7]
            numbers[:, place] = numbers[:, place].abs() * sign
        return x, y

    return batch


def sentences(n):
    """Tokens, every other sentence with padding."""
    x, y = tokens()(n)
    x[:, 0] = torch.tensor([1, 0, 1, 0, 0, 1, 1])[torch.arange(n) % 7]
    return x, y


def by_sign(net, x):
    """Another layer for microbatches with a negative first number."""
    h = net.a(x)
    return net.b(h.tanh()) if x[0, 0] > 0 else h.cos()


def twice_or_once(net, x):
    """A layer that only some rows use a second time."""
    h = net.a(x)
    return net.a(h).tanh() if x[0, 0] > 0 else h


def in_three(net, x):
    """One question, and for those who answer yes another one."""
    h = net.a(x)
    if x[0, 0] > 0:
        h = h.tanh()
        if x[0, 1] > 0:
            h = h * h
    return net.b(h)


def by_number(net, x):
    """A Python number of which there are a few."""
    return net.a(x)[:, : 2 + int(x[0, 0] > 0) + int(x[0, 1] > 0)]


def images(net, x):
    h = net.a(x)
    return (net.b(h) if x[0, 0, 0, 0] > 0 else h).flatten(1)


def words(net, x):
    h = net.a(x)
    return F.linear(h.cos() if x[0, 0] > 0 else h.sin(), net.a.weight)


SIX = {"a": lambda: nn.Linear(6, 6), "b": lambda: nn.Linear(6, 6)}
CASES = {
    "a layer that some rows use": (by_sign, SIX, signed(6)),
    "a layer that some rows use twice": (twice_or_once, {"a": SIX["a"]}, signed(6)),
    "three groups": (in_three, SIX, signed(6)),
    "a number": (by_number, {"a": SIX["a"]}, signed(6)),
    "tolist": (
        lambda net, x: net.a(x) * (2 if x[0, :2].gt(0).tolist() == [True, False] else 1),
        {"a": SIX["a"]},
        signed(6),
    ),
    "convolutions": (
        images,
        {"a": lambda: nn.Conv2d(3, 3, 3, padding=1), "b": lambda: nn.Conv2d(3, 3, 1)},
        signed(3, 5, 5),
    ),
    "a tied embedding": (words, {"a": lambda: nn.Embedding(11, 4, padding_idx=0)}, sentences),
}
GROUPS = {"three groups": 3, "a number": 4, "tolist": 4}  # of three rows and more; others two
each_case = pytest.mark.parametrize("name", CASES)


def case(name, n):
    torch.manual_seed(4)
    run, parts, batch_of = CASES[name]
    model = Net(run, **{part: build() for part, build in parts.items()})
    return model, batch_of(n)


def criterion_of(name):
    if name == "a tied embedding":
        return lambda output, y: wavy(output, y[:, 0])
    return wavy


@pytest.mark.parametrize(("m", "b"), [(2, 3), (7, 1), (8, 2)])
@pytest.mark.parametrize("budget", [0.25, 0])
@each_case
def test_every_question_is_answered_as_by_plain_backward_passes(name, m, b, budget):
    model, batch = case(name, m * b)
    criterion = criterion_of(name)
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    grads_of = gf.microbatch_grads(loss, m, plan="fused", memory_budget=budget)
    rows = grads_of(params, batch)
    assert len(rows.groups) == (GROUPS.get(name, 2) if m > 2 else 2)
    want = plain_rows(model, batch, m, criterion)
    check(rows, want, m)
    check(grads_of(params, batch).first(2), {n: leaf[:2] for n, leaf in want.items()}, 2)
    scales = torch.linspace(0.5, 2.0, m)
    scaled = {n: torch.einsum("m,m...->m...", scales, leaf) for n, leaf in want.items()}
    check(grads_of(params, batch).scaled(scales), scaled, m)


@each_case
def test_orders_of_questions_agree(name):
    model, batch = case(name, 12)
    want = plain_rows(model, batch, 6, criterion_of(name))
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    rows = rows_of(model, batch, "fused", 6, criterion_of(name))
    torch.testing.assert_close(rows.gram(), flat @ flat.T)  # before anything is kept
    check(rows, want, 6)
    rows.release()
    check(rows, want, 6)


def test_rows_of_several_lengths_keep_their_ghost_products():
    """Inputs of groups do not fit together, and nobody makes the rows for the Gram's sake."""

    def run(net, x):
        length = 1 + int(x[0, 0] > 0)
        return net.b(net.a(x)[:length].tanh()).mean(0, keepdim=True).expand(len(x), -1)

    model, batch = Net(run, a=nn.Linear(6, 40), b=nn.Linear(40, 40)), signed(6)(14)
    want = plain_rows(model, batch, 7)
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    rows = rows_of(model, batch, "fused", 7)
    modes = {layer.leaf: layer.mode for layer in rows.layers}
    assert modes["b.weight"] == "ghost" and len(rows.groups) == 2
    torch.testing.assert_close(rows.gram(), flat @ flat.T)
    check(rows, want, 7)
    check(rows_of(model, batch, "fused", 7), want, 7)


def test_modes_of_groups_are_those_of_all_rows():
    def run(net, x):
        h = net.b(net.a(x).tanh())
        return h.sin() if x[0, 0] > 0 else h.cos()

    model, batch = Net(run, a=nn.Linear(6, 40), b=nn.Linear(40, 40)), signed(6)(14)
    of_groups = rows_of(model, batch, "fused", 7)
    model.run = lambda net, x: net.b(net.a(x).tanh())
    assert of_groups.groups and of_groups.layers == rows_of(model, batch, "fused", 7).layers
    assert {layer.mode for layer in of_groups.layers} == {"ghost", "store"}


def test_losses_aux_and_rows_come_in_the_order_of_the_batch():
    model, (x, y) = case("three groups", 7)

    def criterion(output, y):
        return wavy(output, y), {"mean": output.mean(), "none": output.sum(0)}

    params, _ = gf.extract(model)
    rows = gf.per_sample_grads(gf.model_loss(model, criterion, has_aux=True), plan="fused")(
        params, (x, y)
    )
    found = [criterion(model(x[i : i + 1]), y[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(rows.losses, torch.stack([loss for loss, _ in found]).detach())
    for name in ("mean", "none"):
        want = torch.stack([aux[name] for _, aux in found]).detach()
        torch.testing.assert_close(rows.aux[name], want)
    assert len(rows.groups) == 3
    assert sorted(row for group in rows.groups for row in group) == list(range(7))


def test_explain_says_which_rows_had_a_pass_of_their_own():
    model, batch = case("three groups", 7)
    rows = rows_of(model, batch, "fused", 7)
    assert "3 passes" in rows.explain()


def test_rows_elsewhere_are_grouped_as_they_answer_there():
    """A question about the parameters, which other parameters answer otherwise."""

    def run(net, x):
        h = net.a(x)
        return h.tanh() if h[0, 0] > 0 else h.cos()

    model, batch = Net(run, a=nn.Linear(6, 4)), signed(6)(6)
    params, _ = gf.extract(model)
    rows = rows_of(model, batch, "fused", 6)
    for step in (0.3, -0.5):
        elsewhere = {name: p + step * p.sign() for name, p in params.items()}
        moved = copy.deepcopy(model)
        gf.insert(moved, elsewhere)
        check(rows.at(elsewhere), plain_rows(moved, batch, 6), 6)
    own = {name: torch.stack([p * (m - 2.5) for m in range(6)]) for name, p in params.items()}
    each = []
    for m in range(6):
        gf.insert(moved, {name: p[m] for name, p in own.items()})
        each.append({n: leaf[m] for n, leaf in plain_rows(moved, batch, 6).items()})
    want = {name: torch.stack([row[name] for row in each]) for name in params}
    check(rows.at_rows(own), want, 6)
    chunked = gf.microbatch_grads(gf.model_loss(model, wavy), 6, plan="fused", chunk_size=4)
    check(chunked(params, batch).at_rows(own), want, 6)


def dropping(net, x):
    first = bool(x[0, 0] > 0)
    h = F.dropout(net.a(x), 0.4)
    return net.b(h) if first else h


def test_random_numbers_are_those_of_one_pass():
    """A pass that was broken off has drawn numbers; what is asked later sees the same draws."""
    model, batch = Net(dropping, **{k: build() for k, build in SIX.items()}), signed(6)(6)
    params, _ = gf.extract(model)
    torch.manual_seed(7)
    rows = rows_of(model, batch, "fused", 6)
    combined, stacked = rows.combine(torch.ones(6)), rows.stacked()
    assert_trees_close(combined, {n: leaf.sum(0) for n, leaf in stacked.items()}, 1e-12, 1e-13, "")
    assert_trees_close(rows.at(params).stacked(), stacked, 1e-12, 1e-13, "at")
    torch.testing.assert_close(rows.at(params).losses, rows.losses)
    torch.manual_seed(7)
    assert_trees_close(rows_of(model, batch, "fused", 6).stacked(), stacked, 1e-12, 1e-13, "seed")


def test_other_answers_elsewhere_and_random_numbers_are_refused():
    def run(net, x):
        first = bool(net.a(x)[0, 0] > 0)
        h = F.dropout(net.a(x), 0.4)
        return h.tanh() if first else h.cos()

    model, (x, y) = Net(run, a=nn.Linear(6, 4)), signed(6)(6)
    params, _ = gf.extract(model)
    same = {name: p * 0 for name, p in params.items()}  # every row answers no
    loss = gf.model_loss(model, wavy)
    rows = gf.microbatch_grads(loss, 6, plan="fused")(same, (x, y))
    with pytest.raises(RuntimeError, match=r"answer the host .* random numbers"):
        rows.at(params)


def test_answers_that_may_depend_on_random_numbers_make_no_groups():
    """A group would draw other numbers, and go on only where those agree with the answers."""

    def run(net, x):
        h = F.dropout(net.a(x), 0.4)
        return h.tanh() if x[0, 0] > 0 else h.cos()

    model, batch = Net(run, a=nn.Linear(6, 4)), signed(6)(6)
    with pytest.raises(RuntimeError, match=r"__bool__ .*differs from row to row"):
        rows_of(model, batch, "fused", 6)
    model.run = lambda net, x: net.a(x) if (net.a(x) > 9).any() else F.dropout(net.a(x), 0.4)
    assert not rows_of(model, batch, "fused", 6).groups


def test_a_layer_is_left_out_as_often_as_in_passes_in_order():
    """Rows that agree by chance, mostly on the likelier answer, would leave it out too seldom."""

    def run(net, x):
        return net.a(x).tanh() if torch.rand(()) < 0.2 else net.a(x)

    model, batch = Net(run, a=nn.Linear(6, 4)), signed(6)(4)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="draws a random number and asks for a value"):
            rows_of(model, batch, "fused", 4)


def test_buffers_that_rows_hand_on_are_not_taken_apart():
    def run(net, x):
        h = net.b(net.a(x))
        return h.tanh() if x[0, 0] > 0 else h

    model, batch = Net(run, a=nn.Linear(6, 4), b=nn.BatchNorm1d(4)), signed(6)(12)
    with pytest.raises(RuntimeError, match=r"buffer 'b\.running_mean'.* from row to row"):
        rows_of(model, batch, "fused", 4)
    with pytest.warns(UserWarning, match="Fell back"):
        rows = rows_of(model, batch, "auto", 4)
    after = copy.deepcopy(model)
    for x in batch[0].tensor_split(4):
        after(x)
    torch.testing.assert_close(rows.buffers, dict(after.named_buffers()))
    model.eval()
    check(rows_of(model, batch, "fused", 4), plain_rows(model, batch, 4), 4)


def test_rows_that_all_answer_differently_are_refused_by_name():
    model, batch = Net(lambda net, x: net.a(x) * x.sum().item(), a=nn.Linear(6, 4)), inputs(6)(9)
    for m in (3, 9):
        with pytest.raises(RuntimeError, match=r"item .*differs from row to row"):
            rows_of(model, batch, "fused", m)


def test_many_groups_are_refused_by_name():
    def run(net, x):
        return net.a(x)[:, : 1 + int(x[0, 0])]

    x = torch.randn(20, 6)
    x[:, 0] = torch.arange(20) % (MOST_GROUPS + 1)
    model, y = Net(run, a=nn.Linear(6, 12)), torch.arange(20)
    with pytest.raises(RuntimeError, match=r"__int__ .*differs from row to row"):
        rows_of(model, (x, y), "fused", 20)
    x[:, 0] = torch.arange(20) % MOST_GROUPS
    rows = rows_of(model, (x, y), "fused", 20)
    assert len(rows.groups) == MOST_GROUPS
    check(rows, plain_rows(model, (x, y), 20), 20)


def test_a_row_gone_bad_stays_out_of_the_others():
    model, (x, y) = case("a layer that some rows use", 8)
    x[3, 4], x[5, 2] = float("nan"), float("inf")
    want = plain_rows(model, (x, y), 8)
    good = (torch.arange(8) != 3) & (torch.arange(8) != 5)
    weights = good.double() * torch.linspace(-0.7, 1.3, 8)
    for first in ("gram", "combine", "sq_norms"):
        rows = rows_of(model, (x, y), "fused", 8)
        if first != "combine":
            getattr(rows, first)()
        combined = {
            name: torch.tensordot(weights[good], leaf[good], 1) for name, leaf in want.items()
        }
        assert_trees_close(rows.combine(weights), combined, 1e-12, 1e-13, first)
        flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
        torch.testing.assert_close(rows.gram()[good][:, good], (flat @ flat.T)[good][:, good])
        assert not rows.sq_norms()[~good].isfinite().any()


def test_a_nan_answer_is_an_answer_like_another():
    def run(net, x):
        return net.a(x) * (1.0 if x[0, 0].item() != x[0, 0].item() else 2.0)

    model, (x, y) = Net(run, a=nn.Linear(6, 4), b=parameter(2)), inputs(6)(4)
    x[:, 0] = float("nan")
    assert not rows_of(model, (x, y), "fused", 4).groups


def test_auto_says_nothing_of_groups():
    model, batch = case("three groups", 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = rows_of(model, batch, "auto", 7)
    check(rows, plain_rows(model, batch, 7), 7)


def test_autocast_is_that_of_the_first_pass():
    torch.manual_seed(3)
    model = Net(by_sign, a=nn.Linear(6, 6), b=nn.Linear(6, 6)).float()
    x, y = signed(6)(8)
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        rows = rows_of(model, (x, y), "fused", 8)
        want = plain_rows(model, (x, y), 8)
    assert len(rows.groups) == 2
    for name, leaf in rows.stacked().items():
        assert leaf.dtype == torch.float32
        scale = want[name].abs().max()
        torch.testing.assert_close(leaf, want[name], rtol=0.0, atol=2**-6 * scale.item())
    flat = torch.cat([leaf.flatten(1) for leaf in rows.stacked().values()], 1).double()
    torch.testing.assert_close(rows.gram(), flat @ flat.T, rtol=2**-7, atol=2**-7 * 1.0)


class Leaves(nn.Module):
    """Asks for the sign of a number, and may leave something for the rows of the other sign."""

    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Linear(6, 4), how
        self.count, self.flag, self.h, self.last = 0, False, torch.ones(()), torch.zeros(1, 6)

    def forward(self, x):
        y = self.a(x)
        if self.how == "last":
            self.last = x
        if (x[:, 0] > 0).all():
            if self.how == "flag":
                self.flag = True
            elif self.how == "count":
                self.count += 1
            elif self.how == "written by some":
                self.h = x.mean()
            return y * (self.h if self.how == "read by some" else 2.0)
        if self.how == "read by some":
            self.h = x.mean()
        return y * (3.0 if self.flag else 1.0) * (1.0 + self.count) * self.h


@pytest.mark.parametrize("signs", [(1, -1, -1, 1), (-1, 1, 1, -1)])
@pytest.mark.parametrize("how", ["flag", "count", "written by some", "read by some"])
def test_what_one_group_leaves_for_the_rows_of_another_is_refused(how, signs):
    torch.manual_seed(0)
    model, (x, y) = Leaves(how), inputs(6)(4)
    x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
    with pytest.raises(RuntimeError, match=r"attribute '(flag|count|h)'"):
        rows_of(copy.deepcopy(model), (x, y), "fused", 4)
    want = plain_rows(model, (x, y), 4)
    with pytest.warns(UserWarning, match="attribute"):
        rows = rows_of(model, (x, y), "auto", 4)
    check(rows, want, 4)


@pytest.mark.parametrize("signs", [(1, -1, -1, 1), (-1, 1, 1, -1), (1, -1, -1, -1)])
def test_groups_leave_what_the_last_row_leaves(signs):
    torch.manual_seed(0)
    model, (x, y) = Leaves("last"), inputs(6)(4)
    x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
    rows = rows_of(model, (x, y), "fused", 4)
    assert len(rows.groups) == 2
    assert torch.equal(model.last, x[3:])
    check(rows, plain_rows(model, (x, y), 4), 4)


def test_a_hook_on_a_parameter_sees_only_rows_that_use_it():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.a(x) if (x[:, 0] > 0).all() else self.b(x)

    torch.manual_seed(0)
    model, (x, y) = Either(), inputs(6)(4)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1, -1, -1, 1])
    want = plain_rows(model, (x, y), 4)
    model.a.weight.register_hook(lambda g: 2 * g + 1)
    rows = rows_of(model, (x, y), "fused", 4)
    assert len(rows.groups) == 2
    want["a.weight"] = torch.stack(
        [2 * g + 1 if sign > 0 else g for g, sign in zip(want["a.weight"], x[:, 0], strict=True)]
    )
    check(rows, want, 4)


def test_a_group_that_starts_again_for_a_write_does_not_repeat_the_draws_of_another():
    """A pass that writes into the batch starts again with a copy: from where its group started."""

    def loss(params, batch):
        (h,) = batch
        if (h[0, 0] > 0).item():
            h = F.dropout(h, 0.5)
        else:  # only the second group writes into the batch
            h.mul_(2.0)
            h = F.dropout(h, 0.5)
        return (h @ params["w"]).square().sum()

    torch.manual_seed(0)
    params, x = {"w": torch.randn(64)}, torch.randn(6, 64)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1])
    rows = gf.per_sample_grads(loss, plan="fused")(params, (x,))
    first = rows.stacked()["w"]
    assert len(rows.groups) == 2
    masks = first != 0
    for one in range(6):
        for other in range(one):
            assert not torch.equal(masks[one], masks[other]), (one, other)
    rows.release()
    assert torch.equal(rows.stacked()["w"], first)
