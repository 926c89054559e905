"""Grad modes, generators, the module and the graph of the user around a fused pass."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gradfilter as gf
from _models import ConvBN, Dropped, images, vectors
from _zoo_case import PLAN, rows_of, wavy

fused_only = pytest.mark.skipif(PLAN != "fused", reason="only the fused plan has this")
M = 3


def test_a_batch_that_does_not_divide_raises_the_known_error():
    with pytest.raises(ValueError, match="divisible by the number of microbatches"):
        rows_of(Dropped(), vectors(10))


@pytest.mark.usefixtures("float64")
def test_a_microbatch_that_keeps_no_label_has_the_mean_of_nothing():
    model, (x, y) = torch.nn.Linear(6, 3), vectors(12)
    y[4:8] = -100
    loop, fused = (
        rows_of(model, (x, y), plan, criterion=F.cross_entropy) for plan in ("loop", PLAN)
    )
    assert fused.losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(fused.losses, loop.losses, equal_nan=True)
    torch.testing.assert_close(fused.stacked(), loop.stacked(), equal_nan=True)
    weights = torch.tensor([0.5, 0.0, 0.5])
    torch.testing.assert_close(fused.combine(weights), loop.combine(weights))


@pytest.mark.usefixtures("float64")
def test_only_one_small_parameter_is_trained():
    model, batch = ConvBN(), images()
    model.requires_grad_(False)
    model.bn.bias.requires_grad_(True)
    loop, fused = (
        rows_of(model, batch, "loop", criterion=F.cross_entropy),
        rows_of(model, batch, criterion=F.cross_entropy),
    )
    assert set(fused.shapes) == {"bn.bias"}
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.buffers, loop.buffers, rtol=1e-10, atol=1e-12)


@fused_only
def test_agreement_and_an_update_never_ask_for_the_rows(monkeypatch):
    rows = rows_of(ConvBN(), images(), criterion=F.cross_entropy)
    params = {name: torch.zeros(shape) for name, shape in rows.shapes.items()}
    update = gf.chain(gf.agree_filter(1.5), gf.sgd(0.1))

    def refuse(self):
        raise AssertionError("all rows were put together")

    monkeypatch.setattr(type(rows), "stacked", refuse)
    update(params, update.init(params), rows)
    with pytest.raises(AssertionError, match="put together"):
        rows.stacked()


@fused_only
def test_explain_names_every_leaf(capsys):
    rows = rows_of(ConvBN(), images(), criterion=F.cross_entropy)
    rows.gram()
    said = rows.explain()
    assert capsys.readouterr().out == ""
    assert all(name in said for name in rows.shapes)


def test_questions_leave_the_generators_alone():
    rows = rows_of(Dropped(), vectors())
    params = {name: torch.zeros(shape) for name, shape in rows.shapes.items()}
    before = torch.get_rng_state()
    rows.gram()
    rows.combine(torch.ones(M))
    rows.dot(params)
    rows.stacked()
    rows.sq_norms()
    rows.at(params).gram()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_without_random_layers_draws_nothing():
    model, batch = ConvBN(), images()
    before = torch.get_rng_state()
    rows_of(model, batch, criterion=F.cross_entropy).gram()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_forward_pass_serves_all_rows_and_questions():
    """Under the loop the module runs M times; fused it runs once, whatever is asked."""
    model, calls = Dropped(0.0), []
    model.register_forward_hook(lambda *args: calls.append(1))
    rows = rows_of(model, vectors())
    rows.gram()
    rows.combine(torch.ones(M))
    assert len(calls) == (1 if PLAN != "loop" else M)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_any_grad_mode(context):
    model, batch = ConvBN(), images()
    want = rows_of(model, batch, "loop", criterion=F.cross_entropy).gram()
    rows = rows_of(model, batch, criterion=F.cross_entropy)
    with context():
        late = rows.gram()
        if context is not torch.inference_mode:
            inside = rows_of(model, batch, criterion=F.cross_entropy)
            torch.testing.assert_close(inside.gram(), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(late, want, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_modes_changed_after_the_pass_change_no_answer():
    for change in ("eval", "train"):
        model, batch = ConvBN().train(change == "eval"), images()
        params, _ = gf.extract(model)
        expected = rows_of(model, batch, criterion=F.cross_entropy)
        gram, elsewhere = expected.gram(), expected.at(params).gram()
        rows = rows_of(model, batch, criterion=F.cross_entropy)
        getattr(model, change)()
        torch.testing.assert_close(rows.gram(), gram, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rows.at(params).gram(), elsewhere, rtol=1e-10, atol=1e-12)
        assert model.training == (change == "train")


def test_the_module_is_never_mutated():
    model, batch = ConvBN(), images()
    before = copy.deepcopy(model.state_dict())
    rows = rows_of(model, batch, criterion=F.cross_entropy)
    rows.gram()
    rows.combine(torch.ones(M))
    rows.at({n: torch.ones(s) for n, s in rows.shapes.items()}).gram()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training and model.bn.training


@pytest.mark.usefixtures("float64")
def test_gradients_of_the_user_do_not_leak_in_or_out():
    """Parameters and inputs that carry a graph of their own come to no harm."""
    model, (x, y) = Dropped(0.0), vectors()
    params, _ = gf.extract(model)
    want = rows_of(model, (x, y)).gram()
    x = x.requires_grad_()
    tracked = {name: p.clone().requires_grad_() * 1.0 for name, p in params.items()}
    rows = gf.microbatch_grads(gf.model_loss(model, wavy), M, plan=PLAN)(tracked, (x, y))
    torch.testing.assert_close(rows.gram(), want)
    assert not rows.gram().requires_grad and x.grad is None
    assert not any(g.requires_grad for g in rows.combine(torch.ones(M)).values())
