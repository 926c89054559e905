"""The second pass of `sam_perturb`: its batch, random numbers, buffers, or a `grad_fn`."""

import pytest
import torch
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, flat, normal, run, unflat
from _regression import SHAPES, M, ascent, make_rows, problem, rows_at

every_plan = pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
ORDERS = {
    "after the mean": lambda: gf.chain(gf.mean_rows(), gf.sam_perturb(0.5)),
    "before the mean": lambda: gf.chain(gf.sam_perturb(0.5), gf.mean_rows()),
    "per row": lambda: gf.chain(gf.sam_perturb(0.5, per_microbatch=True), gf.mean_rows()),
}
every_order = pytest.mark.parametrize("order", ORDERS)


def dropout_loss(params, x):
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    return (torch.sin(params["w"]) * x * mask).square().mean(), mask


def dropout_grad(w, x, mask):
    w = w.clone().requires_grad_()
    value = (torch.sin(w) * x * mask).square().mean()
    return torch.autograd.grad(value, w)[0]


@every_plan
@every_order
def test_both_passes_drop_the_same_units(plan, order):
    params, x = {"w": normal(6)}, normal(3 * 4, 6, seed=1)
    rows = gf.microbatch_grads(dropout_loss, 3, has_aux=True, plan=plan)(params, x)
    torch.rand(7)  # whatever is drawn in between
    before = torch.get_rng_state()
    h, _ = run(ORDERS[order](), rows, params)
    assert torch.equal(torch.get_rng_state(), before)

    masks, w, x = rows.aux, params["w"], x.reshape(3, 4, 6)
    assert not torch.equal(masks[0], masks[1])
    clean = [dropout_grad(w, *pair) for pair in zip(x, masks, strict=True)]
    assert_close(rows.stacked()["w"], torch.stack(clean))
    mean = torch.stack(clean).mean(0)
    near = [w + ascent(w, g if order == "per row" else mean, 0.5) for g in clean]
    expected = [dropout_grad(*triple) for triple in zip(near, x, masks, strict=True)]
    assert_close(h["w"], torch.stack(expected).mean(0))


def normed_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


@every_plan
@every_order
def test_running_statistics_take_in_every_microbatch_once(plan, order):
    model, reference = normed_net(), normed_net()
    x, y = 3 * normal(M * 5, 4, seed=3) + 1, torch.arange(M * 5) % 3
    update = gf.chain(ORDERS[order](), gf.sgd(0.1))
    loss = gf.model_loss(model, nn.functional.cross_entropy)
    step = gf.train_step(loss, update, microbatches=M, plan=plan)
    state, _ = step(step.init(model), (x, y))
    for part in x.chunk(M):
        reference(part)
    assert_close(state["buffers"], dict(reference.named_buffers()))
    assert state["buffers"]["1.num_batches_tracked"] == M


class Drifting(nn.Module):
    """A module whose output depends on a buffer that every forward pass moves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(4, seed=4))
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.level += 1
        return torch.tanh(x * self.weight * self.level)


@every_order
def test_the_second_pass_starts_from_the_buffers_of_the_first(order):
    model, (x, y) = Drifting(), normal(2, M * 2, 4, seed=5)
    params, buffers = gf.extract(model)
    buffers = {"level": buffers["level"] + 3}
    grads_of = gf.microbatch_grads(gf.model_loss(model, nn.functional.mse_loss), M, plan="loop")
    rows = grads_of(params, (x, y), buffers=buffers)

    def grad(w, m):
        w = w.clone().requires_grad_()
        a, b = (t[2 * m : 2 * m + 2] for t in (x, y))
        value = (torch.tanh(a * w * (4 + m)) - b).square().mean()
        return torch.autograd.grad(value, w)[0]

    w = params["weight"]
    clean = [grad(w, m) for m in range(M)]
    mean = torch.stack(clean).mean(0)
    near = [w + ascent(w, g if order == "per row" else mean, 0.5) for g in clean]
    expected = torch.stack([grad(p, m) for m, p in enumerate(near)]).mean(0)
    h, _ = run(ORDERS[order](), rows, params)
    assert_close(h["weight"], expected)
    assert rows.buffers["level"] == 3 + M
    assert model.level == 0


def plain_problem(seed=0):
    """The regression problem as plain stacked dicts, which cannot be evaluated elsewhere."""
    params, batch, rows, _, _, grads = problem(seed)

    def grad_fn(near):
        return unflat(rows_at(flat(near), batch)[1], SHAPES)

    return params, rows, unflat(grads, SHAPES), grad_fn


@pytest.mark.parametrize(
    "make",
    [
        lambda sam: gf.chain(gf.mean_rows(), sam),
        lambda sam: gf.chain(gf.agree_filter(1.0), sam),
        lambda sam: gf.chain(sam, gf.agree_filter(1.0)),
    ],
    ids=["after the mean", "after a filter", "before a filter"],
)
def test_grad_fn_stands_in_for_rows_that_know_no_other_point(make):
    params, rows, plain, grad_fn = plain_problem(2)
    chain = make(gf.sam_perturb(0.3, adaptive="asam"))
    # A DenseStack, because a chain that begins with sam_perturb takes a plain dict for a tree.
    h, out = run(chain, gf.DenseStack(plain), params, grad_fn=grad_fn)
    assert_close(h, run(chain, rows, params)[0])
    assert out["sam_perturb/surrogate_gap"].isnan()  # plain rows came without losses


@pytest.mark.parametrize(
    "make",
    [
        lambda clip, sam: gf.chain(clip, gf.mean_rows(), sam),
        lambda clip, sam: gf.chain(clip, sam, gf.mean_rows()),
    ],
    ids=["after the mean", "before the mean"],
)
def test_rows_from_grad_fn_keep_the_clipping_factors_too(make):
    params, rows, plain, grad_fn = plain_problem()
    limit = rows.sq_norms().sqrt().median().item()
    chain = make(gf.clip_per_row(limit), gf.sam_perturb(0.3))
    h, _ = run(chain, gf.DenseStack(plain), params, grad_fn=grad_fn)
    assert_close(h, run(chain, rows, params)[0])


def test_rows_that_finite_filter_took_out_stay_out_of_what_grad_fn_gives():
    params, batch, rows, *_ = problem(3, bad=(1,))

    def grad_fn(near):
        again = rows_at(flat(near), batch)[1]
        return unflat(again.nan_to_num(100.0), SHAPES)

    chain = gf.chain(gf.finite_filter(), gf.sam_perturb(0.3), gf.mean_rows())
    h, _ = run(chain, rows, params, grad_fn=grad_fn)
    assert_close(h, run(chain, rows, params)[0])


def test_grad_fn_of_a_stack_is_taken_with_its_losses():
    params, batch, rows, *_ = problem()
    chain = gf.chain(gf.mean_rows(), gf.sam_perturb(0.3))
    given = run(chain, rows, params, grad_fn=lambda near: make_rows(near, batch))
    own = run(chain, rows, params)
    assert_same(given[0], own[0])
    assert_same(given[1]["sam_perturb/surrogate_gap"], own[1]["sam_perturb/surrogate_gap"])


def test_on_one_plain_gradient_grad_fn_gives_a_tree():
    params = {"w": normal(3), "b": normal(2, seed=1)}
    grad_fn = lambda p: {"w": p["w"] ** 3, "b": torch.cos(p["b"])}
    update = gf.chain(gf.sam_perturb(0.3), gf.sgd(0.1))
    moved, _, info = update(params, update.init(params), grad_fn(params), grad_fn=grad_fn)
    w = flat(params)
    near = unflat(w + ascent(w, flat(grad_fn(params)), 0.3), {"w": (3,), "b": (2,)})
    assert_close(flat(moved), w - 0.1 * flat(grad_fn(near)))
    assert info["sam_perturb/surrogate_gap"].isnan()


def test_grad_fn_with_other_leaves_is_refused_by_name():
    params = {"w": normal(3), "b": normal(2, seed=1)}
    with pytest.raises(ValueError, match=r"grad_fn: expected one gradient leaf.*missing \['b'\]"):
        run(gf.sam_perturb(0.1), params, params, grad_fn=lambda p: {"w": p["w"]})


def test_rows_without_another_point_say_what_to_do():
    params, _, plain, _ = plain_problem()
    with pytest.raises(ValueError, match=r"sam_perturb: These rows are a plain stack.*grad_fn"):
        run(gf.chain(gf.mean_rows(), gf.sam_perturb(0.1)), plain, params)
    with pytest.raises(ValueError, match="found neither"):
        run(gf.sam_perturb(0.1), params, params)
