"""A stack of one row: an ordinary pass, without overrides and refusals."""

import pytest
import torch
from torch import nn

import gradfilter as gf
from _models import Dropped, vectors
from _zoo import every_case
from _zoo_case import PLAN, Case, inputs, rows_of, token_loss, tokens
from _zoo_check import ORDERS, Oracle, probe_for

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(PLAN != "fused", reason="only the fused plan has this"),
]


@every_case
def test_one_row_equals_the_loops(case):
    model, batch = case.model(), case.samples(1, 3)
    loop = case.rows(model, batch, 1, 3, "loop")
    oracle = Oracle(loop, probe_for(gf.extract(model)[0], 1), case.rtol)
    for order, options in ((ORDERS[0], {}), (ORDERS[1], {}), (ORDERS[2], {"memory_budget": 0})):
        rows = case.rows(model, batch, 1, 3, PLAN, **options)
        oracle.check_pass(rows, case.name)
        for question in order:
            oracle.check(rows, question, case.name)
        assert not rows.overrides
    assert all(torch.equal(rows.buffers[name], loop.buffers[name]) for name in loop.buffers)


def test_one_row_of_a_sparse_embedding():
    model, batch = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 11)), tokens()(4)
    loop, fused = (
        rows_of(model, batch, plan, m=1, criterion=token_loss) for plan in ("loop", PLAN)
    )
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-10, atol=1e-12)
    weights = torch.tensor([0.5])
    torch.testing.assert_close(fused.combine(weights), loop.combine(weights))


def test_leaves_with_one_gradient_share_no_memory():
    """Two parameters that are added, and one that is the loss: autograd hands on one tensor."""
    loss = lambda params, x: (x * (params["p"] + params["q"])).sum() + params["s"]
    params = {"p": torch.ones(3), "q": torch.ones(3), "s": torch.ones(())}
    weights = torch.ones(1)
    found = gf.microbatch_grads(loss, 1, plan=PLAN)(params, torch.ones(2, 3)).combine(weights)
    places = {leaf.untyped_storage().data_ptr() for leaf in (*found.values(), weights)}
    assert len(places) == 4


def test_one_row_elsewhere_drops_the_same_units():
    model, (x, y) = Dropped(), vectors()
    params, _ = gf.extract(model)
    rows = rows_of(model, (x, y), m=1)
    near = {name: p + 0.1 for name, p in params.items()}
    again, per_row = rows.at(near), rows.at_rows({name: p[None] for name, p in near.items()})
    torch.testing.assert_close(again.stacked(), per_row.stacked())
    assert torch.equal(again.losses, per_row.losses)
    assert torch.equal(rows.at(params).losses, rows.losses)


def test_a_row_gone_bad_stays_out_of_a_combination_of_weight_zero():
    case = Case("bad", lambda: nn.Linear(6, 3), inputs(6))
    model, (x, y) = case.model(), case.samples(1, 3)
    rows = case.rows(model, (x.fill_(torch.inf), y), 1, 3, PLAN)
    assert all(leaf.eq(0).all() for leaf in rows.combine(torch.zeros(1)).values())
    assert not all(leaf.isfinite().all() for leaf in rows.combine(torch.ones(1)).values())
    rows.gram()  # and with everything kept
    assert all(leaf.eq(0).all() for leaf in rows.combine(torch.zeros(1)).values())
