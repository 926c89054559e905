"""Losses that plan "fused" cannot run: an error that names the cause, and the loop under "auto"."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import Counting, OldStyle, vectors
from _zoo_case import PLAN, Net, inputs, parameter, token_loss, tokens, wavy
from _zoo_check import assert_trees_close

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(PLAN != "fused", reason="only the fused plan refuses these"),
]


def branching(net, x):
    h = net.a(x)
    return h if h.sum().item() > 0 else -h


def counted(net, x):
    return net.a(x) * int(1e9 * x[0, 0])


def picked(net, x):
    return net.a(x[x[:, 0] > -9])


def embedding(**options):
    return nn.Sequential(nn.Embedding(11, 4, **options), nn.Linear(4, 11))


linear = lambda run: lambda: Net(run, a=nn.Linear(6, 4))

# Model, batch, criterion, and what the message has to name.
REFUSED = {
    "control-flow": (linear(branching), inputs(6), wavy, "item"),
    "python-number": (linear(counted), inputs(6), wavy, "__int__"),
    "boolean-index": (linear(picked), inputs(6), wavy, "index|nonzero|dynamic"),
    "old-function": (
        linear(lambda net, x: OldStyle.apply(net.a(x))),
        inputs(6),
        wavy,
        "Doubled|setup_context",
    ),
    "buffer-written": (lambda: Counting(False), inputs(6), wavy, "calls"),
    "buffer-assigned": (lambda: Counting(True), inputs(6), wavy, "calls"),
    "sparse-embedding": (lambda: embedding(sparse=True), tokens(), token_loss, "sparse"),
    "max-norm": (lambda: embedding(max_norm=50.0), tokens(), token_loss, "max_norm"),
}
every_refusal = pytest.mark.parametrize("name", REFUSED)


@every_refusal
def test_a_refusal_names_the_operation(name):
    build, batch_of, criterion, named = REFUSED[name]
    model, batch = build(), batch_of(16)
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), 8, plan="fused")
    with pytest.raises(RuntimeError, match=named):
        grads_of(params, batch, buffers=buffers).gram()


@every_refusal
def test_auto_goes_back_to_the_loop_with_one_warning(name):
    build, batch_of, criterion, _ = REFUSED[name]
    model, batch = build(), batch_of(16)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    want = gf.microbatch_grads(loss, 8, plan="loop")(params, batch, buffers=buffers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = gf.microbatch_grads(loss, 8)(params, batch, buffers=buffers)
        rows.gram()
    # "auto" may have chosen the loop at once, without a word.
    assert len(caught) <= 1
    assert all('plan "loop"' in str(warning.message) for warning in caught)
    assert_trees_close(rows.combine(torch.ones(8)), want.combine(torch.ones(8)), 1e-12, 0.0, name)
    torch.testing.assert_close(rows.buffers, want.buffers)


def test_batch_norm_over_processes_is_refused():
    """Outside of a process group it is an ordinary BatchNorm: right, or refused by its name."""
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), inputs(3, 4, 4)(6)
    params, _ = gf.extract(model)
    of = lambda plan: gf.microbatch_grads(gf.model_loss(model, wavy), 3, plan=plan)(params, batch)
    try:
        rows = of("fused")
    except RuntimeError as refusal:
        assert "SyncBatchNorm" in str(refusal)
    else:
        torch.testing.assert_close(rows.stacked(), of("loop").stacked(), rtol=1e-9, atol=1e-12)


def test_the_users_own_error_comes_through():
    model, batch = nn.Linear(5, 3), vectors()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan="fused")
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied|mat1"):
        grads_of(params, batch)


def test_a_refused_pass_leaves_nothing_behind():
    """The next pass of the same model, and the generators, are as if it had not been tried."""
    model, (x, y) = Net(branching, a=nn.Linear(6, 4), b=parameter(2)), inputs(6)(6)
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, wavy), 3, plan="fused")
    with pytest.raises(RuntimeError):
        grads_of(params, (x, y)).gram()
    assert (model(x) * 0 == 0).all()
    model.run = lambda net, x: net.a(x)
    loop = gf.microbatch_grads(gf.model_loss(model, wavy), 3, plan="loop")(params, (x, y))
    torch.testing.assert_close(grads_of(params, (x, y)).gram(), loop.gram())
