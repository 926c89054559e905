"""Losses that use the module's tensors: their gradients are those of an ordinary backward pass.

The reference is a backward pass per microbatch on the plain module, in float64.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")

PLANS = [("auto", 3), ("auto", 1), ("loop", 3), ("vmap", 3)]
every_plan = pytest.mark.parametrize("plan, m", PLANS)
X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 5


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def plain_rows(model, criterion, m):
    """One backward pass per microbatch on a copy of the plain module."""
    rows = []
    for x, y in zip(X.chunk(m), Y.chunk(m), strict=True):
        model.zero_grad()
        criterion(model(x.clone()), y).backward()
        rows.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in model.named_parameters()
            }
        )
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def rows_of(model, criterion, m, plan, quiet=False):
    params, buffers = gf.extract(model)
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        return gf.microbatch_grads(gf.model_loss(model, criterion), m, plan=plan)(
            params, (X, Y), buffers=buffers
        )


def assert_same(rows, want):
    """All questions agree with the reference, asked in an order in which each comes first once."""
    weights = torch.linspace(0.3, 1, len(rows))
    combined = {name: torch.einsum("m,m...->...", weights, leaf) for name, leaf in want.items()}
    torch.testing.assert_close(rows.combine(weights), combined, rtol=1e-10, atol=1e-12)
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    torch.testing.assert_close(rows.gram(), flat @ flat.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-10, atol=1e-12)


def penalty(model):
    return lambda out, y: (
        F.cross_entropy(out, y) + 0.1 * sum(p.square().sum() for p in model.parameters())
    )


def consistency(model):
    def criterion(out, y):
        nudged = model(torch.ones(len(y), 6) * 0.3)
        return F.cross_entropy(out, y) + (out - nudged).square().mean()

    return criterion


def orthogonality(model):
    def criterion(out, y):
        w = model[0].weight
        return F.cross_entropy(out, y) + 0.1 * (w.T @ w - torch.eye(6)).square().sum()

    return criterion


@every_plan
@pytest.mark.parametrize("make", [penalty, consistency, orthogonality])
def test_a_criterion_that_uses_the_module_has_its_gradient(make, plan, m):
    model = network()
    criterion = make(model)
    assert_same(rows_of(model, criterion, m, plan), plain_rows(model, criterion, m))


def test_a_penalty_in_the_criterion_trains_as_in_a_plain_loop():
    ends = {}
    for kind in ("plain", "filtered"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        criterion = lambda out, y, model=model: (
            F.cross_entropy(out, y) + 0.5 * sum(p.square().sum() for p in model.parameters())
        )
        filtered = Filtered(model, criterion, gf.mean_rows(), optimizer, 3)
        for _ in range(50):
            if kind == "filtered":
                filtered.step(X, Y)
                continue
            optimizer.zero_grad()
            criterion(model(X), Y).backward()
            optimizer.step()
        ends[kind] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ends["filtered"], ends["plain"], rtol=1e-9, atol=1e-11)


class Asks(nn.Module):
    """A module that asks autograd's questions of its parameters and activations."""

    def __init__(self, ask):
        super().__init__()
        self.a, self.b, self.ask = nn.Linear(6, 8), nn.Linear(8, 5), ask

    def forward(self, x):
        h = self.a(x)
        return self.b(self.ask(self, h).tanh())


def penalises_what_is_trained(module, h):
    return h + sum(p.square().sum() for p in module.parameters() if p.requires_grad)


def reverses_guarded(module, h):
    if h.requires_grad:
        h.register_hook(lambda g: -g)
    return h


def clips_gradients(module, h):
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return h


def scales_by_the_row(module, h):
    scale = h.detach().abs().mean()
    h.register_hook(lambda g: g * scale)
    return h


def asks_for_leaves(module, h):
    assert not h.is_leaf and h.grad_fn is not None and module.a.weight.is_leaf
    assert not h.detach().requires_grad and h.detach().grad_fn is None
    return h * (2 if module.a.weight.requires_grad else 3)


def asks_for_parameters(module, h):
    assert isinstance(module.a.weight, nn.Parameter)
    return h + module.get_parameter("a.weight").sum()


def requires_grad_of_an_input(module, h):
    still = h.detach()
    still.requires_grad_()
    assert still.requires_grad
    return h + 0.5 * still


ASKS = [
    penalises_what_is_trained,
    reverses_guarded,
    clips_gradients,
    scales_by_the_row,
    asks_for_parameters,
]
# torch.func.grad has its own words for leaves, under plan "vmap".
ASKS_LEAVES = [asks_for_leaves, requires_grad_of_an_input]


@pytest.mark.parametrize(
    "ask, plan, m",
    [(ask, *how) for ask in ASKS for how in PLANS]
    + [(ask, *how) for ask in ASKS_LEAVES for how in PLANS if how[0] != "vmap"],
)
def test_questions_to_autograd_are_answered_as_outside(ask, plan, m):
    model = Asks(ask)
    assert_same(rows_of(model, F.cross_entropy, m, plan), plain_rows(model, F.cross_entropy, m))


@pytest.mark.parametrize("plan, m", [("auto", 3), ("auto", 1), ("loop", 3)])
@pytest.mark.parametrize("kind", ["full", "full pre"])
def test_backward_hooks_of_modules_run_in_every_row(kind, plan, m):
    model = network()
    if kind == "full":
        model[2].register_full_backward_hook(lambda module, gi, go: (gi[0] * 3,))
    else:
        model[2].register_full_backward_pre_hook(lambda module, go: (go[0].clamp(-0.1, 0.1),))
    want = plain_rows(model, F.cross_entropy, m)
    assert_same(rows_of(model, F.cross_entropy, m, plan, quiet=True), want)


def test_the_fused_plan_names_a_backward_hook():
    model = network()
    model[2].register_full_backward_hook(lambda module, gi, go: None)
    with pytest.raises(RuntimeError, match="backward hook on module '2'"):
        rows_of(model, F.cross_entropy, 3, "fused")


@every_plan
def test_hooks_on_parameters_run_on_every_row(plan, m):
    model = network()
    mask = (torch.arange(48).view(8, 6) % 2 == 0).double()
    model[0].weight.register_hook(lambda g: g * mask)
    model[2].weight.register_hook(lambda g: g.clamp(-0.05, 0.05))
    want = plain_rows(model, F.cross_entropy, m)
    assert_same(rows_of(model, F.cross_entropy, m, plan), want)


@every_plan
def test_late_hooks_on_parameters_are_refused(plan, m):
    model = network()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"no post-accumulate hook .* '0\.weight'"):
        rows_of(model, F.cross_entropy, m, plan)


@every_plan
def test_a_hook_that_forward_registers_on_a_parameter_is_refused(plan, m):
    def hooks(module, h):
        module.b.bias.register_hook(lambda g: 2 * g)
        return h

    with pytest.raises(ValueError, match=r"no hook on a parameter, found one on 'b\.bias'"):
        rows_of(Asks(hooks), F.cross_entropy, m, plan)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="a loss of newer torch")
@pytest.mark.parametrize("plan, m", [("auto", 3), ("auto", 1), ("loop", 3)])
def test_a_chunked_linear_cross_entropy_trains(plan, m):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            options = nn.LinearCrossEntropyOptions()
            self.a = nn.Linear(6, 8)
            self.loss = nn.LinearCrossEntropyLoss(8, 5, options=options)

        def forward(self, batch):
            return self.loss(self.a(batch[0]).tanh(), batch[1])

    model = Whole()
    loss = gf.model_loss(model, lambda out, y: out)
    params, _ = gf.extract(model)
    got = gf.microbatch_grads(loss, m, plan=plan)(params, (((X, Y),), Y))
    want = {name: [] for name in params}
    for x, y in zip(X.chunk(m), Y.chunk(m), strict=True):
        model.zero_grad()
        model((x, y)).backward()
        for name, p in model.named_parameters():
            want[name].append(p.grad.clone())
    stacked = {name: torch.stack(rows) for name, rows in want.items()}
    torch.testing.assert_close(got.stacked(), stacked, rtol=1e-9, atol=1e-11)


class Bypasses(nn.Module):
    """Reaches its first layer's weights by another way than the attribute."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(8, 5), way
        if way == "list":
            self.own = [self.a.weight, self.a.bias]
        if way == "dict":
            self.own = {"w": self.a.weight, "b": self.a.bias}
        if way == "unregistered":
            self.own = [self.a]
            del self._modules["a"]
            self.w, self.bias = self.own[0].weight, self.own[0].bias

    def forward(self, x):
        if self.way == "unregistered":
            return self.b(self.own[0](x).tanh())
        own = self.own.values() if self.way == "dict" else self.own
        return self.b(F.linear(x, *own).tanh())


@every_plan
@pytest.mark.parametrize("way", ["list", "dict", "unregistered"])
def test_parameters_reached_by_another_way_are_refused_with_the_way(way, plan, m):
    model = Bypasses(way)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"reached by 'own' of Bypasses"):
        rows_of(model, F.cross_entropy, m, plan)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@every_plan
def test_a_cached_list_in_the_criterion_is_refused_although_every_leaf_is_reached(plan, m):
    model = network()
    cached = list(model.parameters())
    criterion = lambda out, y: F.cross_entropy(out, y) + sum(p.square().sum() for p in cached)
    with pytest.raises(ValueError, match="reached by 'cached' of the criterion"):
        rows_of(model, criterion, m, plan)


@every_plan
def test_a_frozen_teacher_beside_the_model_is_no_stranger(plan, m):
    model, teacher = network(), network()

    def criterion(out, y):
        with torch.no_grad():
            soft = teacher(torch.ones(len(y), 6)).softmax(1)
        return F.cross_entropy(out, y) + F.cross_entropy(out, soft)

    assert_same(rows_of(model, criterion, m, plan), plain_rows(model, criterion, m))


def test_cached_parametrizations_are_refused():
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import orthogonal

    model = network()
    orthogonal(model[0])
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"no .*parametrize.cached\(\)"):
        rows_of(model, F.cross_entropy, 3, "auto")


@pytest.mark.parametrize("m", [1, 3])
def test_a_reentrant_checkpoint_runs_in_the_loop(m):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = network()

        def forward(self, x):
            h = self.n[0](x)
            return torch.utils.checkpoint.checkpoint(self.n[1:], h, use_reentrant=True)

    model = Checkpointed()
    want = plain_rows(model, F.cross_entropy, m)
    grads = [p.grad for p in model.parameters()]
    for plan in ("loop", "auto"):
        assert_same(rows_of(model, F.cross_entropy, m, plan, quiet=True), want)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


class Held:
    """An object that torch knows nothing of."""

    def __init__(self, x):
        self.x = x


@every_plan
def test_an_object_with_tensors_in_the_batch_is_refused(plan, m):
    loss = lambda params, batch: (batch["graph"].x @ params["w"]).mean() * batch["w"].mean()
    batch = {"graph": Held(X), "w": torch.ones(12)}
    with pytest.raises(TypeError, match="inside of Held, which would go whole"):
        gf.microbatch_grads(loss, m, plan=plan)({"w": torch.randn(6, 5)}, batch)


def test_a_registered_dataclass_in_the_batch_is_split():
    from dataclasses import dataclass

    @dataclass
    class Graph:
        x: torch.Tensor
        y: torch.Tensor

    torch.export.register_dataclass(Graph)
    loss = lambda params, batch: F.cross_entropy(batch["graph"].x @ params["w"], batch["graph"].y)
    w = torch.randn(6, 5)
    rows = gf.microbatch_grads(loss, 3)({"w": w}, {"graph": Graph(X, Y)})
    want = [F.cross_entropy(x @ w, y) for x, y in zip(X.chunk(3), Y.chunk(3), strict=True)]
    torch.testing.assert_close(rows.losses, torch.stack(want))


class AssignsItsBuffer(nn.Module):
    """Adds what it has met to the loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, out, y):
        value = F.cross_entropy(out, y) + self.mean * out.mean()
        self.mean = value.detach() / 2
        return value


class HoldsItsMean:
    """The same, no module."""

    def __init__(self):
        self.mean = torch.zeros(())

    __call__ = AssignsItsBuffer.forward


class Counts:
    """Weighs the loss by how often it was called."""

    calls = 0

    def __call__(self, out, y):
        self.calls += 1
        return self.calls * F.cross_entropy(out, y)


@pytest.mark.parametrize("make", [AssignsItsBuffer, HoldsItsMean, Counts])
def test_what_a_criterion_remembers_is_handed_from_row_to_row_or_refused(make):
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], 5)
    criterion, plain = make(), make()
    want = plain_rows(model, plain, 3)
    for plan in ("fused", "vmap"):
        with pytest.raises(RuntimeError, match=r"attribute 'criterion\.(mean|calls)'"):
            rows_of(model, make(), 3, plan)
    rows = rows_of(model, criterion, 3, "auto", quiet=True)
    assert_same(rows, want)
    again = rows.at(gf.extract(model)[0])
    assert torch.equal(again.losses, rows.losses)
    left, expected = (vars(c).get("calls", getattr(c, "mean", None)) for c in (criterion, plain))
    torch.testing.assert_close(left, expected)


def test_a_part_of_the_model_may_be_called_criterion():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion, self.calls = nn.Linear(X.shape[1], 5), 0

        def forward(self, x):
            return self.criterion(x)

    def count(module, args):
        module.calls = getattr(module, "calls", 0) + 1

    model = Named()
    model.criterion.calls = 0
    model.criterion.register_forward_pre_hook(count)
    with pytest.raises(RuntimeError, match=r"attribute 'criterion\.calls'"):
        rows_of(model, nn.CrossEntropyLoss(), 3, "fused")
