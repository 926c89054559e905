"""Attributes that share memory with a parameter or buffer follow what replaces it in a pass."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import vectors
from _plain import module_rows
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
M = 4
PLANS = ["auto", "fused", "vmap", "loop"]


class Viewing(nn.Module):
    """A buffer and a part of it as attributes; one of them is written in every pass."""

    def __init__(self, written, attribute):
        super().__init__()
        self.linear, self.written = nn.Linear(6, 3), written
        self.register_buffer("seen", torch.arange(3.0))
        make = {
            "the buffer": lambda b: b,
            "a part": lambda b: b[1:],
            "a strided part": lambda b: b[::2],
            "detached": torch.Tensor.detach,
        }
        self.part = make[attribute](self.seen)

    def forward(self, x):
        target = self.part if self.written == "attribute" else self.seen
        target.mul_(0.5).add_(1)
        return self.linear(x) * (1 + self.seen) * (1 + self.part.sum())


class Statistics(nn.Module):
    """The running mean of a BatchNorm as an attribute of another module, which reads it."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)
        self.mean = self.norm.running_mean

    def forward(self, x):
        h = self.linear(x)
        return self.norm(h) + self.mean * h


class Anchored(nn.Module):
    """A penalty to an attribute that was meant to stay, but is the weight itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.anchor = self.linear.weight.detach()
        self.first_row = self.linear.weight.data[0]

    def forward(self, x):
        penalty = (self.linear.weight - self.anchor).square().sum()
        return self.linear(x) * (1 + penalty + self.first_row.sum())


class Parts(nn.Module):
    """Parts of a weight that were cut once, with their graph: they have a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.first_row = self.linear.weight[0]
        self.turned = self.linear.weight.t()[1::2]

    def forward(self, x):
        y = self.linear(x) * (1 + self.first_row.square().sum())
        return y + x[:, 1::2] @ self.turned.tanh()


def models():
    for attribute in ("the buffer", "a part", "a strided part", "detached"):
        for written in ("attribute", "buffer"):
            yield f"{attribute}, {written} written", lambda w=written, a=attribute: Viewing(w, a)
    yield "running mean", Statistics
    yield "anchor", Anchored
    yield "parts", Parts


MODELS = dict(models())


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_ordinary_passes(name, plan):
    batch = vectors()
    losses, expected = module_rows(made(name), F.cross_entropy, batch, M)
    model = made(name)
    own = {key: value for key, value in vars(model).items() if isinstance(value, torch.Tensor)}
    before = copy.deepcopy(model.state_dict())
    params, buffers = gf.extract(model)
    compute = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=plan)
    context = contextlib.nullcontext()
    if plan in ("fused", "vmap") and name not in ("anchor", "parts"):
        context = pytest.raises(RuntimeError, match=r"cannot hand buffer .* from row to row")
    with context:
        rows = compute(params, batch, buffers=buffers)
        torch.testing.assert_close(rows.losses, losses)
        torch.testing.assert_close(dict(rows.stacked()), expected)
        torch.testing.assert_close(dict(rows.at(params).stacked()), expected)
    for key, value in own.items():
        assert getattr(model, key) is value
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_a_pure_update_and_of_a_host(name):
    data = [vectors() for _ in range(3)]
    plain = made(name)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in data:
        grads = module_rows(plain, F.cross_entropy, batch, M)[1]
        for key, parameter in plain.named_parameters():
            parameter.grad = grads[key].mean(0)
        optimizer.step()

    chain = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    pure = made(name)
    step = gf.train_step(gf.model_loss(pure, F.cross_entropy), chain, microbatches=M)
    state = step.init(pure)
    for batch in data:
        state, _ = step(state, batch)

    hosted = made(name)
    host = Filtered(
        hosted,
        F.cross_entropy,
        gf.mean_rows(),
        torch.optim.SGD(hosted.parameters(), lr=0.1),
        microbatches=M,
    )
    for batch in data:
        host.step(*batch)
    for key, value in plain.state_dict().items():
        found = {**state["params"], **state["buffers"]}[key]
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(hosted.state_dict()[key], value, rtol=1e-12, atol=1e-12)


class Rebound(nn.Module):
    """A buffer that every pass replaces, and an attribute that keeps the tensor from before."""

    def __init__(self, follows):
        super().__init__()
        self.linear, self.follows = nn.Linear(6, 3), follows
        self.register_buffer("seen", torch.arange(3.0))
        self.first = self.seen

    def forward(self, x):
        self.seen = self.seen * 1.1 + 0.1
        if self.follows:
            self.first = self.seen
        return self.linear(x) * (1 + self.seen - self.first)


@pytest.mark.parametrize("plan", PLANS)
def test_an_attribute_that_keeps_a_replaced_buffer_is_refused(plan):
    """It would have to keep its number from row to row and step to step; a host would write it."""
    model = Rebound(follows=False)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    expected = "found it replaced by another tensor while attribute 'first' keeps the old one"
    with pytest.raises(ValueError, match=expected):
        gf.microbatch_grads(loss, M, plan=plan)(params, vectors(), buffers=buffers)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    host = Filtered(model, F.cross_entropy, gf.mean_rows(), sgd, microbatches=M, plan=plan)
    with pytest.raises(ValueError, match=expected):
        host.step(*vectors())
    assert model.first is model.seen
    assert torch.equal(model.seen, torch.arange(3.0))


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_an_attribute_that_is_replaced_with_its_buffer_follows_it(plan):
    batch = vectors()
    torch.manual_seed(0)
    losses, expected = module_rows(Rebound(follows=True), F.cross_entropy, batch, M)
    torch.manual_seed(0)
    model = Rebound(follows=True)
    params, buffers = gf.extract(model)
    compute = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=plan)
    rows = compute(params, batch, buffers=buffers)
    torch.testing.assert_close(rows.losses, losses)
    torch.testing.assert_close(dict(rows.stacked()), expected)


def test_a_view_that_every_pass_makes_anew_stays_fused():
    """It shares the memory of the weight from the second step on, and is not read before."""

    class Stash(nn.Linear):
        def forward(self, x):
            self.seen = self.weight.T
            return super().forward(x) + 0.1 * self.seen.sum()

    model, plain = Stash(6, 3), Stash(6, 3)
    plain.load_state_dict(model.state_dict())
    hosts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    host = Filtered(model, F.mse_loss, gf.mean_rows(), hosts[0], M, plan="fused")
    for _ in range(3):
        x = vectors()[0]
        host.step(x, x[:, :3])
        grads = module_rows(plain, F.mse_loss, (x, x[:, :3]), M)[1]
        for key, parameter in plain.named_parameters():
            parameter.grad = grads[key].mean(0)
        hosts[1].step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_what_a_pass_assigns_stays():
    class Renewed(Viewing):
        def forward(self, x):
            found = super().forward(x)
            self.part = found.detach().mean(0)
            return found

    batch = vectors()
    plain, model = Renewed("buffer", "a part"), Renewed("buffer", "a part")
    model.load_state_dict(plain.state_dict())
    params, buffers = gf.extract(model)
    compute = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan="loop")
    losses, expected = module_rows(plain, F.cross_entropy, batch, M)
    rows = compute(params, batch, buffers=buffers)
    torch.testing.assert_close(rows.losses, losses)
    torch.testing.assert_close(dict(rows.stacked()), expected)
    torch.testing.assert_close(model.part, plain.part)


def test_a_view_of_other_strides_is_refused():
    model = nn.Linear(6, 3)
    model.column = model.weight.detach()[:, 0]
    params, _ = gf.extract(model)
    params = {**params, "weight": params["weight"].t().contiguous().t()}
    with pytest.raises(ValueError, match=r"attribute 'column' is a view of it.*in forward"):
        gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan="loop")(
            params, vectors()
        ).stacked()


# --- State that a scripted module keeps outside of Python ---


class Counts(nn.Module):
    calls: int

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Remembers(nn.Module):
    last: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(6, 3), torch.zeros(3)

    def forward(self, x):
        found = self.linear(x) + self.last
        self.last = found.detach().mean(0)
        return found


class Lists(nn.Module):
    kept: list[torch.Tensor]
    sizes: dict[str, int]

    def __init__(self):
        super().__init__()
        self.linear, self.kept, self.sizes = nn.Linear(6, 3), [torch.ones(3)], {"calls": 1}

    def forward(self, x):
        found = self.linear(x) * self.kept[-1] * self.sizes["calls"]
        self.kept.append(found.detach().mean(0))
        self.sizes["calls"] += 1
        return found


class Stores(nn.Module):
    """An activation that no later pass reads."""

    last: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(6, 3), torch.zeros(3)

    def forward(self, x):
        self.last = self.linear(x)
        return self.last


def scripted(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        return torch.jit.script(kind())


def scripted_state(model):
    names = [n for n in ("calls", "last", "kept", "sizes") if hasattr(model, n)]
    return [torch.utils._pytree.tree_leaves(getattr(model, name)) for name in names]


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [Counts, Remembers, Lists, Stores])
def test_state_of_a_scripted_module(kind, plan):
    batch = vectors()
    plain = scripted(kind)
    losses, expected = module_rows(plain, F.cross_entropy, batch, M)
    model = scripted(kind)
    compute = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=plan)
    params, _ = gf.extract(model)
    context = contextlib.nullcontext()
    if plan in ("fused", "vmap") and kind is not Stores:
        context = pytest.raises(RuntimeError, match=r"changes attribute '(calls|last|kept|sizes)'")
    with context:
        rows = compute(params, batch)
        torch.testing.assert_close(rows.losses, losses)
        torch.testing.assert_close(dict(rows.stacked()), expected)
        torch.testing.assert_close(dict(rows.at(params).stacked()), expected)
        if plan == "auto" and kind is Stores:
            assert repr(rows).startswith("FusedStack")
        torch.testing.assert_close(scripted_state(model), scripted_state(plain))
