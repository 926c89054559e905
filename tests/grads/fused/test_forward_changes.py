"""Whatever changes between two steps of one gradient function holds from the next step on.

Nothing that a step may remember from the step before can be used if the module, the loss, the
sizes or the settings of torch have changed. The reference is an ordinary backward pass.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import gradfilter as gf
from gradfilter.grads.fused import _tape

ROWS, WIDTH = 3, 6
FACTOR = [1.0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = 0.5
        self.extra = None

    def forward(self, x):
        h = self.norm(self.a(x).tanh() * self.scale)
        return self.b(h if self.extra is None else self.extra(h))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def criterion(logits, targets):
    return FACTOR[0] * F.cross_entropy(logits, targets)


@pytest.fixture
def model():
    torch.manual_seed(0)
    FACTOR[0] = 1.0
    return Net().double()


def batch_for(model, samples):
    torch.manual_seed(samples)
    dtype = model.a.weight.dtype
    return torch.randn(ROWS * samples, WIDTH, dtype=dtype), torch.randint(WIDTH, (ROWS * samples,))


def ordinary_rows(model, batch):
    """The gradients of the microbatches by ordinary backward passes; buffers stay as they were."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    rows = []
    for x, y in zip(*(t.chunk(ROWS) for t in batch), strict=True):
        model.zero_grad()
        criterion(model(x), y).backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows.append({name: p.grad.clone() for name, p in trainable.items()})
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check(grads_of, model, samples=4, **tolerance):
    batch = batch_for(model, samples)
    params, buffers = gf.extract(model)
    stack = grads_of(params, batch, buffers=buffers)
    expected = ordinary_rows(model, batch)
    matrix = torch.cat([leaf.flatten(1) for leaf in expected.values()], 1).double()
    torch.testing.assert_close(stack.gram(), matrix @ matrix.T, **tolerance)
    mean = stack.combine(torch.full((ROWS,), 1 / ROWS, dtype=torch.float64))
    assert mean.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(mean[name], leaf.mean(0), **tolerance)
    return expected


def tie(model):
    model.b.weight = model.a.weight


def patched_linear(layer, x):
    return F.linear(x, layer.weight, layer.bias).sin()


CHANGES = {
    "a forward hook": lambda model: model.a.register_forward_hook(lambda m, i, out: out.exp()),
    "a gradient hook": lambda model: model.a.weight.register_hook(lambda grad: 3 * grad),
    "a frozen parameter": lambda model: model.a.weight.requires_grad_(False),
    "an attribute": lambda model: setattr(model, "scale", 2.0),
    "a replaced module": lambda model: setattr(model, "a", nn.Linear(WIDTH, WIDTH).double()),
    "a new module": lambda model: setattr(model, "extra", nn.Linear(WIDTH, WIDTH).double()),
    "a module of another size": lambda model: setattr(
        model, "extra", nn.Sequential(nn.Linear(WIDTH, 50), nn.Linear(50, WIDTH)).double()
    ),
    "a tied weight": tie,
    "a parametrisation": lambda model: parametrize.register_parametrization(
        model.a, "weight", Twice()
    ),
    "evaluation mode": lambda model: model.eval(),
    "an instance's forward": lambda model: setattr(
        model.a, "forward", lambda x: F.linear(x, model.a.weight, model.a.bias).cos()
    ),
    "the criterion": lambda model: FACTOR.__setitem__(0, 3.0),
    "another dtype": lambda model: model.float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_holds_from_the_next_step_on(model, change):
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused")
    before = check(grads_of, model)
    CHANGES[change](model)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if change == "another dtype" else {}
    after = check(grads_of, model, **tolerance)
    same = before.keys() == after.keys() and all(
        before[name].shape == after[name].shape and torch.equal(before[name], after[name])
        for name in before
    )
    assert not same  # the change matters


def test_a_class_that_is_patched(model, monkeypatch):
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused")
    check(grads_of, model)
    monkeypatch.setattr(nn.Linear, "forward", patched_linear)
    check(grads_of, model)


def test_a_replaced_buffer(model):
    grads_of = gf.microbatch_grads(gf.model_loss(model.eval(), criterion), ROWS, plan="fused")
    check(grads_of, model)
    model.norm.running_mean = torch.arange(WIDTH, dtype=torch.float64)
    check(grads_of, model)


def test_an_untied_weight(model):
    tie(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused")
    check(grads_of, model)
    model.b.weight = nn.Parameter(model.a.weight.detach().clone())
    check(grads_of, model)


def test_autocast_that_begins_and_ends(model):
    grads_of = gf.microbatch_grads(gf.model_loss(model.float(), criterion), ROWS, plan="fused")
    exact = check(grads_of, model, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = check(grads_of, model, rtol=5e-2, atol=2e-2)
    assert not torch.equal(exact["a.weight"], rounded["a.weight"])
    check(grads_of, model, rtol=1e-3, atol=1e-5)


def test_batches_of_other_sizes(model):
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused")
    for samples in (4, 2, 40, 4):
        check(grads_of, model, samples)


def modes_of(model, samples=4, **options):
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused", **options)
    params, buffers = gf.extract(model)
    run = grads_of(params, batch_for(model, samples), buffers=buffers).run
    return run, run.modes


def test_modes_are_chosen_once_for_equal_sizes(model):
    first, again = modes_of(model)[1], modes_of(model)[1]
    assert first is again


@pytest.mark.parametrize(
    "options", [{"samples": 5}, {"samples": 50}, {"memory_budget": 0}, {"memory_budget": 900}]
)
def test_modes_are_chosen_again_for_other_sizes_and_budgets(model, options):
    usual = modes_of(model)[1]
    run, found = modes_of(model, **options)
    tape = run._forward.tape
    sizes = tuple((name, leaf.shape, leaf.element_size()) for name, leaf in tape.leaves.items())
    budget, lean = options.get("memory_budget", 10**9), "memory_budget" not in options
    fresh = _tape._modes_for.__wrapped__(sizes, tuple(tape.uses), budget, lean, 2.5)
    assert found == fresh and found != usual


def test_the_bound_of_ghost_products_is_part_of_what_is_remembered(model, monkeypatch):
    """Each use of this weight is a ghost for both bounds, but the two uses together are not."""
    tie(model)
    (usual, uses), bound = (modes_of(model)[1], uses_of(model)), 10.0
    monkeypatch.setattr("gradfilter.grads.fused._factors.LARGE_SUM", bound)
    found = modes_of(model)[1]
    assert uses_of(model) == uses
    assert usual.layers["a.weight"].mode == "store"
    assert found.layers["a.weight"].mode == "ghost"


def uses_of(model):
    return modes_of(model)[0]._forward.tape.uses


def test_no_model_and_no_tensor_is_kept(model):
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), ROWS, plan="fused")
    params, buffers = gf.extract(model)
    stack = grads_of(params, batch_for(model, 4), buffers=buffers)
    stack.combine(torch.ones(ROWS))
    alive = [weakref.ref(thing) for thing in (stack, stack.run, params["a.weight"])]
    del stack, params, grads_of
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_tensor_of_the_user_gets_no_gradient(rows):
    """The graph of such a loss ends elsewhere too, so a backward pass is told where to end."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(params, batch):
        return (scale * (batch @ params["w"]).square()).mean()

    w = torch.randn(4, dtype=torch.float64)
    grads_of = gf.microbatch_grads(loss, rows, plan="fused")
    found = grads_of({"w": w}, x).combine(torch.full((rows,), 1 / rows, dtype=torch.float64))
    own = w.clone().requires_grad_()
    (want,) = torch.autograd.grad((2.0 * (x @ own).square()).mean(), own)
    torch.testing.assert_close(found["w"], want)
    assert scale.grad is None
