"""Attributes that a pass leaves and the next one reads: rows are those of a plain loop."""

import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows
from gradfilter.grads import _remembered_attributes
from gradfilter.interop import Filtered, step_gaf

pytestmark = pytest.mark.usefixtures("float64")
M = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class FirstMean(Net):
    """Normalises by the mean of the first rows that it has seen."""

    mean = None

    def inner(self, h):
        if self.mean is None:
            self.mean = h.mean(0).detach()
        return (h - self.mean).tanh()


class NewMean(Net):
    def inner(self, h):
        if not hasattr(self, "mean"):
            self.mean = h.mean(0).detach()
        return (h - self.mean).tanh()


class Previous(Net):
    """Penalises the distance to the rows before."""

    previous = None

    def inner(self, h):
        scale = 1.0 if self.previous is None else 1 + (h.mean() - self.previous)
        self.previous = h.mean().detach()
        return h.tanh() * scale


class DetachesEverySecond(Net):
    """Changes gradients, but no loss."""

    frozen = False

    def inner(self, h):
        self.frozen = not self.frozen
        return h if self.frozen else h.detach()


class FirstFlag(Net):
    first_call = True

    def inner(self, h):
        first, self.first_call = self.first_call, False
        return h * 2 if first else h


class Switches(Net):
    """Leaves another training mode than it found."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5).eval()

    def inner(self, h):
        self.drop.train(not self.drop.training)
        return h * (2.0 if self.drop.training else 1.0)


class Hooked(Net):
    """Counts in a hook that closes over a list."""

    def __init__(self):
        super().__init__()
        calls = [0]

        def count(module, inputs, output):
            calls[0] += 1
            return output * calls[0]

        self.first.register_forward_hook(count)

    def inner(self, h):
        return h.tanh()


NETS = [FirstMean, NewMean, Previous, DetachesEverySecond, FirstFlag, Switches, Hooked]


def batch(ignored=()):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(2, (8,), generator=generator)
    for row in ignored:
        targets.view(M, 2)[row] = -100
    return torch.randn(8, 3, generator=generator), targets


def plain(net, data):
    return module_rows(net, F.cross_entropy, data, M)


@pytest.mark.parametrize("ignored", [(), (3,), (0, 3)])
@pytest.mark.parametrize("net", NETS)
def test_rows_are_those_of_a_plain_loop(net, ignored):
    losses, want = plain(net(), batch(ignored))
    model = net()
    params, _ = gf.extract(model)
    with pytest.warns(UserWarning, match="Fell back"):
        rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M)(params, batch(ignored))
    torch.testing.assert_close(rows.losses, losses, rtol=1e-12, atol=1e-12, equal_nan=True)
    live = losses.isfinite()
    for name, leaf in rows.stacked().items():
        torch.testing.assert_close(leaf[live], want[name][live], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["fused", "vmap"])
@pytest.mark.parametrize("net", NETS)
def test_plans_over_all_rows_refuse_it(net, plan):
    model = net()
    params, _ = gf.extract(model)
    with pytest.raises(RuntimeError, match=r"attribute|training mode"):
        gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=plan)(params, batch())


class Stored(Net):
    """Keeps an activation that nothing reads."""

    def inner(self, h):
        self.seen, self.shape = h, tuple(h.shape)
        return h.tanh()


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_an_activation_that_is_only_stored_stays_in_one_pass(plan):
    model = Stored()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=plan)(params, batch())
    _, want = plain(Stored(), batch())
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-12, atol=1e-12)


# --- State that the backward pass changes ---


def hooked(factor):
    def loss(params, data):
        h = (data[0] @ params["w"]).tanh()
        h.register_hook(lambda grad: grad * factor())
        return F.cross_entropy(h @ params["v"], data[1])

    return loss


class Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * random.random()


def counting():
    calls = [0]

    def count():
        calls[0] += 1
        return calls[0]

    return hooked(count)


LOSSES = {
    "Python's random in a hook": lambda: hooked(random.random),
    "a counter in a hook": counting,
    "Python's random in a function": lambda: (
        lambda params, data: F.cross_entropy(
            Scaled.apply((data[0] @ params["w"]).tanh()) @ params["v"], data[1]
        )
    ),
}


def weights():
    generator = torch.Generator().manual_seed(3)
    shapes = {"w": (3, 4), "v": (4, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("budget", [0.25, 0])
@pytest.mark.parametrize("name", LOSSES)
def test_hooks_that_draw_or_count_do_so_in_every_row(name, budget):
    loss, want = LOSSES[name](), []
    random.seed(0)
    for x, y in zip(*(t.chunk(M) for t in batch()), strict=True):
        leaves = {n: p.requires_grad_() for n, p in weights().items()}
        want.append(torch.autograd.grad(loss(leaves, (x, y)), list(leaves.values())))
    random.seed(0)
    grads_of = gf.microbatch_grads(LOSSES[name](), M, memory_budget=budget)
    with pytest.warns(UserWarning, match="a hook or a backward function draws from or changes"):
        rows = grads_of(weights(), batch()).stacked()
    for leaf, expected in zip(rows.values(), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(leaf, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [0.25, 0])
@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_all_questions_see_the_noise_of_the_first_backward_pass(plan, budget):
    def loss(params, data):
        h = (data[0] @ params["w"]).tanh()
        h.register_hook(lambda grad: grad + torch.randn_like(grad))
        return F.cross_entropy(h @ params["v"], data[1])

    rows = gf.microbatch_grads(loss, M, plan=plan, memory_budget=budget)(weights(), batch())
    combined, norms = rows.combine(torch.ones(M)), rows.sq_norms()
    stacked = rows.stacked()
    again = rows.at(weights()).stacked()
    flat = torch.cat([leaf.flatten(1) for leaf in stacked.values()], 1)
    torch.testing.assert_close(norms, flat.square().sum(1), rtol=1e-12, atol=1e-12)
    for name, leaf in stacked.items():
        torch.testing.assert_close(combined[name], leaf.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again[name], leaf, rtol=1e-12, atol=1e-12)
    later = gf.microbatch_grads(loss, M, plan=plan, memory_budget=budget)(weights(), batch())
    assert not torch.equal(later.stacked()["w"], stacked["w"])


# --- A criterion that writes a buffer of its own ---


class Averages(nn.Module):
    """Divides by a running mean of its losses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output, targets):
        loss = F.cross_entropy(output, targets)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean


class Deep(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def inner(self, h):
        return self.more(h)


@pytest.mark.parametrize("host", ["Filtered", "step_gaf"])
def test_a_criterion_with_a_running_buffer_ends_and_is_right(host):
    """A model of many modules: its small criterion does not belong to it."""
    plain_model, criterion = Deep(), Averages()
    for x, y in zip(*(t.chunk(M) for t in batch()), strict=True):
        (criterion(plain_model(x), y) / M).backward()
    with torch.no_grad():
        for p in plain_model.parameters():
            p -= 0.1 * p.grad
    model, own = Deep(), Averages()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="Fell back"):
        if host == "Filtered":
            Filtered(model, own, gf.mean_rows(), optimizer, M).step(*batch())
        else:
            pairs = list(zip(*(t.chunk(M) for t in batch()), strict=True))
            step_gaf(model, optimizer, own, pairs, cos_distance_thresh=2.0, average="mean")
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own.mean, criterion.mean)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_references_that_recurrent_modules_keep_to_their_weights_cost_no_pass(kind):
    """Torch makes them anew when weights are exchanged; no row needs what the last one left."""
    model = nn.Sequential(kind(3, 4, batch_first=True), Last(), nn.Linear(4, 2))
    batch = torch.randn(6, 5, 3), torch.arange(6) % 2
    params, _ = gf.extract(model)
    with mock.patch.object(_remembered_attributes, "_row_with") as again:
        rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan="fused")(
            params, batch
        )
    assert not again.called
    _, expected = module_rows(model, F.cross_entropy, batch, 3)
    for name, leaf in rows.stacked().items():
        torch.testing.assert_close(leaf, expected[name], msg=name)


class Last(nn.Module):
    def forward(self, found):
        return found[0][:, -1]
