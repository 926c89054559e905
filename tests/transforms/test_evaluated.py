"""The accessor of the parameters to evaluate: in chains, partitions and train states."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, normal_tree

FREE = gf.schedule_free(gf.sgd(0.1))
AHEAD = gf.msam(gf.sgd(0.1, momentum=0.9), 0.5)


def trained(update, params, steps=4, **extra):
    state = update.init(params)
    for k in range(steps):
        params, state, _ = update(params, state, normal_tree(k + 1), **extra)
    return params, state


@pytest.mark.parametrize(
    "around",
    [
        lambda rule: gf.chain(gf.clip_by_global_norm(100.0), rule),
        lambda rule: gf.chain(gf.chain(gf.agc_clip(None), rule)),
        lambda rule: gf.named("mine", rule),
        lambda rule: gf.every(1, rule),
        lambda rule: gf.gate(rule, "on"),
    ],
)
@pytest.mark.parametrize("rule", [FREE, AHEAD], ids=["schedule_free", "msam"])
def test_it_is_found_wherever_the_rule_stands(rule, around):
    params = normal_tree(0)
    expected, own = trained(rule, params)
    after, state = trained(around(rule), params, on=torch.tensor(True))
    assert_close(after, expected)
    found = gf.evaluated_params(after, state)
    assert_close(found, gf.evaluated_params(expected, own))
    assert all((found[n] != after[n]).any() for n in found)
    assert list(found) == list(after)


def test_branches_of_a_partition_have_their_own_and_others_pass():
    params = normal_tree(0)
    labels = {"fc.weight": "free", "fc.bias": "ahead", "scale": "plain", "conv.weight": "plain"}
    branches = {"free": FREE, "ahead": AHEAD, "plain": gf.sgd(0.1)}
    after, state = trained(gf.partition(branches, labels.get), params)
    found = gf.evaluated_params(after, state)
    for name in params:
        if labels[name] == "plain":
            assert found[name] is after[name]
            continue
        rule, own = branches[labels[name]], {name: params[name]}
        inner = rule.init(own)
        for k in range(4):
            own, inner, _ = rule(own, inner, {name: normal_tree(k + 1)[name]})
        assert_close(found[name], gf.evaluated_params(own, inner)[name])
        assert (found[name] != after[name]).any()


@pytest.mark.parametrize("rule", [FREE, AHEAD], ids=["schedule_free", "msam"])
def test_a_train_state_and_its_checkpoint(rule):
    class Odd(nn.Module):
        """A parameter has the name of the entry that is looked for."""

        def __init__(self):
            super().__init__()
            self.ahead_of_evaluated = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.ahead_of_evaluated

    step = gf.train_step(
        gf.model_loss(Odd(), F.mse_loss), gf.chain(gf.mean_rows(), rule), microbatches=2
    )
    state = step.init(Odd())
    for _ in range(3):
        state, _ = step(state, (torch.ones(4, 3), torch.zeros(4, 3)))
    found = gf.evaluated_params(state["params"], state)
    assert (found["ahead_of_evaluated"] != state["params"]["ahead_of_evaluated"]).any()
    again = gf.load_state_dict(step.init(Odd()), gf.state_dict(state))
    assert_same(gf.evaluated_params(again["params"], again), found)


def test_other_states_leave_the_parameters_as_they_are():
    params = normal_tree(0)
    after, state = trained(gf.chain(gf.sgd(0.1, momentum=0.9), gf.ema_params()), params)
    assert gf.evaluated_params(after, state) == after
    assert gf.evaluated_params(after, {}) == after


def test_nothing_is_written_and_before_the_first_step_nothing_differs():
    params = normal_tree(0)
    state = AHEAD.init(params)
    assert_same(gf.evaluated_params(params, state), params)
    after, state = trained(AHEAD, params)
    before = gf.state_dict(state), {n: p.clone() for n, p in after.items()}
    gf.evaluated_params(after, state)
    assert_same((gf.state_dict(state), after), before)


def test_the_state_of_other_parameters_is_refused():
    after, state = trained(AHEAD, normal_tree(0))
    with pytest.raises(ValueError, match=r"found one of \['scale'\] in addition"):
        gf.evaluated_params({n: p for n, p in after.items() if n != "scale"}, state)


@pytest.mark.parametrize("donate", [False, True])
def test_donated_steps_are_the_same(donate):
    params = normal_tree(0)
    for rule in (FREE, AHEAD):
        expected, own = trained(rule, params)
        given = {n: p.clone() for n, p in params.items()}
        after, state = trained(rule, given, donate=donate)
        assert_close(after, expected)
        assert_close(gf.evaluated_params(after, state), gf.evaluated_params(expected, own))
