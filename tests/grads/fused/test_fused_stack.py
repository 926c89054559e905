"""Stacks derived from a fused stack, and the memory that a stack frees after its last answer."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _models import ConvBN, Dropped, Tied, images, token_loss, tokens, vectors
from _zoo_case import PLAN
from _zoo_check import QUESTIONS, Oracle, probe_for
from gradfilter import _tree

pytestmark = pytest.mark.usefixtures("float64")

M = 4
MODELS = {
    "conv": (ConvBN, images, F.cross_entropy),
    "tied": (Tied, tokens, token_loss),
    "mlp": (lambda: Dropped(0.0), vectors, F.cross_entropy),
}
every_model = pytest.mark.parametrize("name", MODELS)


def stacks(name):
    """The loop's stack and the fused one of the same batch, and the parameters."""
    build, batch_of, criterion = MODELS[name]
    model, batch = build(), batch_of()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    loop, fused = (
        gf.microbatch_grads(loss, M, plan=plan)(params, batch, buffers=buffers)
        for plan in ("loop", PLAN)
    )
    return loop, fused, params


def assert_same(fused, loop, params):
    chosen = {name: params[name] for name in loop.shapes}
    oracle = Oracle(loop, probe_for(chosen, len(loop)))
    assert list(fused.shapes) == list(loop.shapes)
    assert torch.equal(fused.live, loop.live)
    for question in QUESTIONS:
        if question != "agree_filter" or len(loop) > 1:
            oracle.check(fused, question, "")


FACTORS = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
VIEWS = {
    "scaled": lambda rows: rows.scaled(FACTORS),
    "scaled twice": lambda rows: rows.scaled(FACTORS).scaled(FACTORS + 1),
    "columns": lambda rows: rows.columns(list(rows.shapes)[:2]),
    "last column": lambda rows: rows.columns(list(rows.shapes)[-1:]),
    "first": lambda rows: rows.first(3),
    "one row": lambda rows: rows.first(1),
    "all at once": lambda rows: rows.columns(list(rows.shapes)[1:]).first(3).scaled(FACTORS[:3]),
    "another order": lambda rows: rows.scaled(FACTORS).first(3).columns(list(rows.shapes)[1:]),
}


@every_model
@pytest.mark.parametrize("view", VIEWS)
def test_views_equal_the_loops(name, view):
    loop, fused, params = stacks(name)
    assert_same(VIEWS[view](fused), VIEWS[view](loop), params)


@every_model
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_stack_that_has_answered(name, view):
    loop, fused, params = stacks(name)
    fused.gram()
    fused.combine(torch.ones(M))
    assert_same(VIEWS[view](fused), VIEWS[view](loop), params)
    assert_same(fused, loop, params)


@every_model
def test_elsewhere(name):
    loop, fused, params = stacks(name)
    moved = {n: p + 0.1 * torch.randn_like(p) for n, p in params.items()}
    assert_same(fused.at(moved), loop.at(moved), params)
    assert_same(fused.scaled(FACTORS).at(moved), loop.scaled(FACTORS).at(moved), params)
    assert_same(fused.first(2).at(moved), loop.first(2).at(moved), params)
    some = dict(list(moved.items())[:1])
    assert_same(fused.at(some), loop.at(some), params)
    assert_same(fused.at(moved).at(params), loop, params)


@every_model
def test_every_row_elsewhere(name):
    loop, fused, params = stacks(name)
    own = {n: p + 0.1 * torch.randn(M, *p.shape) for n, p in params.items()}
    assert_same(fused.at_rows(own), loop.at_rows(own), params)
    cut = {n: p[:2] for n, p in own.items()}
    assert_same(fused.first(2).at_rows(cut), loop.first(2).at_rows(cut), params)
    some = dict(list(own.items())[1:])
    assert_same(fused.at_rows(some), loop.at_rows(some), params)


@every_model
def test_at_is_bit_for_bit_the_same_pass(name):
    _, fused, params = stacks(name)
    again = fused.at(params)
    assert torch.equal(again.losses, fused.losses)
    assert all(torch.equal(again.buffers[n], b) for n, b in fused.buffers.items())
    assert all(torch.equal(again.stacked()[n], g) for n, g in fused.stacked().items())


@every_model
def test_inputs_changed_afterwards_do_not_reach_the_stack(name):
    """A stack answers for the parameters it was made at, whatever becomes of them later."""
    build, batch_of, criterion = MODELS[name]
    model, batch = build(), batch_of()
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), M, plan=PLAN)
    want = grads_of(params, batch, buffers=buffers).combine(torch.ones(M))
    rows = grads_of(params, batch, buffers=buffers)
    moved = {n: p + 1 for n, p in params.items()}
    grads_of(moved, batch, buffers=buffers).gram()
    rows.at(moved).gram()
    got = rows.combine(torch.ones(M))
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_links_from_agreement_to_sharpness_follow_the_loop():
    loop, fused, params = stacks("conv")
    for links in (
        [gf.agree_filter(1.5), gf.sam_perturb(0.05), gf.gsam_decompose(0.4)],
        [gf.sam_perturb(0.05, per_microbatch=True), gf.agree_filter(1.5)],
        [gf.clip_per_row(0.1), gf.consensus_filter(1.5)],
        [gf.sign_agreement(0.7)],
    ):
        update = gf.chain(*links, gf.sgd(0.1))
        want, *_ = update(params, update.init(params), loop)
        got, *_ = update(params, update.init(params), fused)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_groups_of_leaves_follow_the_loop():
    loop, fused, params = stacks("conv")
    chain = lambda lr: gf.chain(gf.agree_filter(1.5), gf.sgd(lr))
    label = lambda name: "head" if "head" in name else "body"
    update = gf.partition({"body": chain(0.1), "head": chain(0.2)}, label)
    want, *_ = update(params, update.init(params), loop)
    got, *_ = update(params, update.init(params), fused)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


class Storages(TorchDispatchMode):
    """Keeps weak references to the storages of all tensors made meanwhile."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _tree.leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self):
        """Bytes."""
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize("ask", ["chain", "gram", "combine", "stacked"])
def test_a_stack_that_has_answered_lets_go_of_its_pass(ask):
    """Keeping an old stack must keep neither activations nor, once they are used up, rows."""
    wide = [nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 3)]
    model, batch = nn.Sequential(*wide), vectors()
    params, _ = gf.extract(model)
    update = gf.chain(gf.agree_filter(2.0), gf.sgd(0.1))
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan=PLAN)
    with Storages() as storages:
        rows = grads_of(params, batch)
        if ask == "chain":
            update(params, update.init(params), rows)
        else:
            QUESTIONS[ask](rows, probe_for(params, M))
    one_activation = 12 * 2000 * 8
    if ask in ("chain", "combine"):
        assert storages.alive() < one_activation
    assert rows.losses.grad_fn is None
    del rows
    assert storages.alive() < one_activation
