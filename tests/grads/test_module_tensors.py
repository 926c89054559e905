"""Modules with shared parts, tied weights or new buffers are never mutated."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import vectors
from gradfilter.grads._module_tensors import modules_of

pytestmark = pytest.mark.usefixtures("float64")
every_plan = pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])


class Shared(nn.Module):
    """One Linear and one BatchNorm registered under two names each, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.norm_a = self.norm_b = nn.BatchNorm1d(6)
        self.out, self.back = nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False)
        self.tied = nn.Linear(6, 3, bias=False)
        self.tied.weight = self.out.weight

    def forward(self, x):
        h = self.norm_b(self.second(self.norm_a(self.first(x)).tanh()))
        return self.out(h) + self.tied(self.back(self.out(h)))


class Wrapped(nn.Module):
    """A linear layer behind one of torch's own parametrisations, or something odd done to r."""

    def __init__(self, kind):
        super().__init__()
        linear = nn.Linear(6, 3)
        wrap = {
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
            "old_spectral_norm": nn.utils.spectral_norm,
        }
        self.kind, self.linear = kind, wrap[kind](linear) if kind in wrap else linear
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        h = self.linear(x)
        if self.kind == "setitem":
            self.seen[0] = 5.0
        elif self.kind == "augmented":
            self.seen[0] += 1
        elif self.kind == "view":
            self.seen.view(-1).add_(1)
        elif self.kind == "out":
            torch.add(self.seen, 1, out=self.seen)
        elif self.kind == "foreach":
            torch._foreach_add_([self.seen], 1.0)
        elif self.kind == "reads":
            h = self.norm(h) + self.norm.running_mean
        elif self.kind == "evaluates":
            n = self.norm
            h = F.batch_norm(n(h), n.running_mean, n.running_var, training=False)
        return h


UNREPLAYABLE = [
    "setitem",
    "augmented",
    "view",
    "out",
    "foreach",
    "reads",
    "evaluates",
    "spectral_norm",
    "old_spectral_norm",
]


def snapshot(model):
    tensors = [
        (name, id(t), type(t), t._version, t.detach().clone())
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    ]
    return tensors, [m.training for m in model.modules()]


def assert_untouched(model, before, copyable=True):
    tensors, modes = snapshot(model)
    assert modes == before[1] and len(tensors) == len(before[0])
    for now, then in zip(tensors, before[0], strict=True):
        assert now[:4] == then[:4] and torch.equal(now[4], then[4])
    if copyable:
        copy.deepcopy(model)


def naive(model, batch, m):
    model = copy.deepcopy(model)
    rows = []
    for x, y in zip(*(t.chunk(m) for t in batch), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return rows, dict(model.named_buffers())


def assert_equals_naive(stack, model, batch, m, expected=None):
    rows, buffers = expected or naive(model, batch, m)
    for i, row in enumerate(rows):
        for name, grad in row.items():
            torch.testing.assert_close(stack.stacked()[name][i], grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stack.buffers, buffers, rtol=1e-10, atol=1e-12)


@every_plan
def test_shared_modules_and_tied_weights(plan):
    model, batch = Shared(), vectors()
    before = snapshot(model)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 3, plan=plan)(params, batch, buffers=buffers)
    assert_untouched(model, before)
    assert_equals_naive(rows, model, batch, 3)
    rows.at({name: p + 1 for name, p in params.items()})
    assert_untouched(model, before)


@every_plan
def test_a_module_used_twice_in_a_sequence(plan):
    layer = nn.Linear(6, 6)
    model, batch = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3)), vectors()
    before = snapshot(model)
    params, _ = gf.extract(model)
    moved = {name: p + 0.1 for name, p in params.items()}
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(moved, batch)
    assert_untouched(model, before)
    gf.insert(model, moved)
    assert_equals_naive(rows, model, batch, 3)


@pytest.mark.parametrize("kind", UNREPLAYABLE)
def test_the_loop_follows_and_vmap_refuses_what_it_cannot_replay(kind):
    model, batch = Wrapped(kind), vectors()
    before, expected = snapshot(model), naive(model, batch, 3)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 3, plan="loop")(params, batch, buffers=buffers)
    assert_equals_naive(rows, model, batch, 3, expected)
    for plan in ("vmap", "fused"):
        with pytest.raises(RuntimeError, match=r'cannot hand buffer .* Use plan="loop"'):
            gf.microbatch_grads(loss, 3, plan=plan)(params, batch, buffers=buffers)
    # The old spectral_norm keeps its last weight in a plain attribute, which nobody gives back.
    assert_untouched(model, before, copyable=kind != "old_spectral_norm")


@every_plan
def test_weight_norm(plan):
    model, batch = Wrapped("weight_norm"), vectors()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 3, plan=plan)(params, batch, buffers=buffers)
    assert_equals_naive(rows, model, batch, 3)


@every_plan
def test_a_stack_answers_in_the_mode_it_was_taken_in(plan):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    batch = vectors()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 3, plan=plan)(params, batch, buffers=buffers)
    model.eval()
    before = snapshot(model)
    assert torch.equal(rows.at(params).losses, rows.losses)
    assert_untouched(model, before)


def test_without_buffers_the_modules_own_are_copied():
    model, batch = Shared(), vectors()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model.eval(), F.cross_entropy), 3)(params, batch)
    kept = {name: b.clone() for name, b in rows.buffers.items()}
    model.train()(batch[0])
    assert all(torch.equal(rows.buffers[name], b) for name, b in kept.items())


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("cache", None)

    def forward(self, x):
        self.cache = x.mean(0)
        return self.linear(x)


def test_a_buffer_that_appears_is_taken_back_and_refused():
    model = Lazy()
    params, buffers = gf.extract(model)
    with pytest.raises(ValueError, match="found 'cache' of Lazy filled"):
        gf.model_loss(model, F.cross_entropy)(params, vectors(), buffers)
    assert model.cache is None


@every_plan
def test_names_that_are_not_the_models(plan):
    model, batch = Shared(), vectors()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    grads_of = gf.microbatch_grads(loss, 3, plan=plan)
    fewer = {name: p for name, p in params.items() if name != "out.weight"}
    with pytest.raises(ValueError, match=r"missing \['out.weight'\], extra \['typo'\]"):
        grads_of({**fewer, "typo": torch.ones(1)}, batch, buffers=buffers)
    with pytest.raises(ValueError, match=r"buffers of the model, missing \['norm_a"):
        loss(params, batch, {})


@every_plan
def test_sparse_embeddings_give_dense_rows(plan):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    ids, y = torch.randint(0, 9, (6, 2)), torch.arange(6) % 3
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan="loop")
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    assert_equals_naive(grads_of(params, (ids, y)), dense, (ids, y), 3)


class WithoutParts(nn.Sequential):
    """A module that hides its parts."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self


def nested():
    model = nn.Sequential(Shared(), nn.Sequential(nn.Linear(6, 6), nn.Identity()))
    model.none = None
    model.register_module("empty", None)
    model.again = model[1][0]
    return model


@pytest.mark.parametrize(
    "model", [nested(), nn.Sequential(nested(), WithoutParts(nn.Linear(1, 1))), nn.Linear(1, 1)]
)
def test_modules_are_those_of_torch_in_its_order(model):
    assert list(modules_of(model).items()) == list(model.named_modules())
