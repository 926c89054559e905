"""Rows of several batches: held together, or computed again part by part, with one answer."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _allocations import Peak
from gradfilter.grads._joined_stacks import choose, join
from gradfilter.grads._row_parts import (
    PartedStack,
    RunningSum,
    dense_rows,
    join_stacks,
    without_rows,
)

pytestmark = pytest.mark.usefixtures("float64")
SIZES = (2, 3, 1)


def problem(plan, aux=False):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    criterion = lambda o, y: (F.cross_entropy(o, y), o.square().sum()) if aux else None
    loss = gf.model_loss(model, criterion if aux else F.cross_entropy, has_aux=aux)
    params, _ = gf.extract(model)
    stacks = []
    for count in SIZES:
        batch = torch.randn(2 * count, 4) * count, torch.randint(0, 3, (2 * count,))
        stacks.append(gf.microbatch_grads(loss, count, plan=plan)(params, batch))
    return params, stacks


def both(plan, change=lambda stack, k: stack, aux=False):
    """The same rows held together, and in parts."""
    params, stacks = problem(plan, aux)
    held = join_stacks([dense_rows(stack) for stack in stacks])
    parts = [without_rows(change(stack, k)) for k, stack in enumerate(stacks)]
    return params, held, PartedStack(parts)


def factors():
    return torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5, 0.25])


def change_all(stack, k):
    return stack.scaled(torch.split(factors(), SIZES)[k])


def near(params):
    return {name: p + 0.1 * torch.randn_like(p) for name, p in params.items()}


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def compare(parted, held):
    assert (len(parted), parted.shapes) == (len(held), held.shapes)
    assert_same(parted.losses, held.losses)
    assert_same(parted.live, held.live)
    assert_same(parted.mean_loss(), held.mean_loss())
    weights = torch.linspace(-1, 2, len(held))
    weights[0] = 0
    assert_same(parted.combine(weights), held.combine(weights))
    assert_same(parted.sq_norms(), held.sq_norms())
    assert_same(parted.gram(), held.gram())
    assert_same(parted.stacked(), held.stacked())
    tree = {name: torch.randn(shape) for name, shape in held.shapes.items()}
    assert_same(parted.dot(tree), held.dot(tree))


@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
def test_parts_answer_as_held_rows_do(plan):
    params, held, parted = both(plan)
    compare(parted, held)
    scaled = both(plan, change_all)[2]
    compare(scaled, held.scaled(factors()))
    compare(parted.scaled(factors()), held.scaled(factors()))
    names = list(params)[:2]
    compare(scaled.columns(names), held.scaled(factors()).columns(names))
    for count in (1, 2, 4, 6):
        compare(scaled.first(count), held.scaled(factors()).first(count))
    assert not parted.gram_is_cheap() and parted.explain().count("\n") >= 2


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_parts_at_other_parameters_are_held_rows_there(plan):
    params, held, parted = both(plan)
    there = near(params)
    del there[next(iter(there))]
    compare(parted.at(there), held.at(there))
    compare(parted.at(there).first(3), held.at(there).first(3))
    scaled, parts = held.scaled(factors()), both(plan, change_all)[2]
    compare(parts.at(there), scaled.at(there))
    compare(parts.at(there).at(params), scaled)
    compare(parted.like(parts), scaled)
    compare(parts.like(held), scaled)
    each = {name: torch.stack([p + 0.1 * m for m in range(6)]) for name, p in params.items()}
    compare(parts.at_rows(each), scaled.at_rows(each))


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_stacks_of_other_stacks_hold_no_rows_either(plan):
    names = ["0.weight", "0.bias"]
    others = ["3.weight", "3.bias"]

    def masked(stack, k):
        return join(change_all(stack.columns(names), k), stack.columns(others))

    def gated(stack, k):
        return choose(torch.tensor(k != 1), change_all(stack, k), stack)

    params, held, parted = both(plan, masked)
    want = join(held.scaled(factors()).columns(names), held.columns(others))
    compare(parted, want)
    there = near(params)
    compare(parted.at(there), want.at(there))
    params, held, parted = both(plan, gated)
    own = factors()
    own[2:5] = 1
    compare(parted, held.scaled(own))
    with pytest.raises(ValueError, match="some leaves or factors were chosen separately"):
        parted.like(held)


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_aux_and_buffers_are_those_of_all_parts(plan):
    params, held, parted = both(plan, aux=True)
    assert_same(parted.aux, held.aux)
    there = near(params)
    assert_same(parted.at(there).aux, held.at(there).aux)
    assert parted.at(there).buffers == held.buffers == {}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = parted.nonsense
    with pytest.raises(AttributeError, match="nonsense"):
        _ = parted.parts[0].nonsense


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_a_combination_elsewhere_runs_every_part_once(plan):
    calls = []

    def loss(params, batch):
        calls.append(len(batch))
        return (params["w"] * batch).square().mean()

    params = {"w": torch.tensor(2.0)}
    of = lambda batch: gf.per_sample_grads(loss, plan=plan)(params, batch)
    stacks = [of(torch.randn(3)), of(torch.randn(3))]
    elsewhere = PartedStack([without_rows(s) for s in stacks]).at({"w": torch.tensor(1.0)})
    calls.clear()
    elsewhere.combine(torch.ones(6))
    per_pass = {"fused": 1, "loop": 3}[plan]
    assert len(calls) == 2 * per_pass
    assert elsewhere.losses.shape == (6,) and len(calls) == 2 * per_pass


def test_questions_hold_the_rows_of_one_part():
    model = nn.Linear(200, 200)
    loss = gf.model_loss(model, F.cross_entropy)
    params, _ = gf.extract(model)
    size = sum(p.nbytes for p in params.values())
    grads_of = gf.microbatch_grads(loss, 4, plan="loop")
    with Peak() as memory:
        parts = []
        for _ in range(6):
            batch = torch.randn(4, 200), torch.arange(4)
            parts.append(without_rows(grads_of(params, batch)))
            del batch
        gc.collect()
        assert memory.now < 0.5 * size
        memory.peak = 0
        PartedStack(parts).combine(torch.ones(24))
    assert memory.peak < 12 * size  # the rows of one part while they are stacked, and sums


def test_rows_that_cannot_be_computed_again_stay():
    rows = gf.DenseStack({"w": torch.eye(2)})
    assert without_rows(rows) is rows
    with pytest.raises(ValueError, match="cannot answer `at`"):
        PartedStack([rows]).at({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="weights of shape"):
        PartedStack([rows]).combine(torch.ones(3))
    with pytest.raises(ValueError, match="1 <= count"):
        PartedStack([rows]).first(3)


def test_a_sum_is_kept_wide_and_changes_no_tree():
    total, one = RunningSum(), torch.ones(2, dtype=torch.bfloat16)
    for _ in range(600):
        total.add({"w": one})
    assert total.rounded(torch.tensor(600))["w"].tolist() == [1, 1]
    assert total.rounded()["w"].dtype == torch.bfloat16 and one.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"found \['v', 'w'\] in some only"):
        total.check({"v": one})
