"""Skipped steps: what observes changes, counters count, and nothing else changes a bit."""

import copy

import pytest
import torch

import gradfilter as gf
from _cases import flip, is_head, label, make_params, make_rows
from gradfilter._state_rules import settled
from gradfilter.schedules import linear


def sgd():
    return gf.sgd(0.1, momentum=0.9)


NESTED = {
    "named": lambda part: gf.chain(gf.mean_rows(), gf.named("own", gf.chain(part, flip())), sgd()),
    "masked": lambda part: gf.chain(gf.mean_rows(), gf.masked(part, is_head), sgd()),
    "gate, open": lambda part: gf.chain(gf.mean_rows(), gf.gate(part, "on"), sgd()),
    "partition": lambda part: gf.chain(
        gf.mean_rows(), gf.partition({"head": gf.chain(part, sgd()), "body": sgd()}, label)
    ),
    "every": lambda part: gf.chain(gf.mean_rows(), gf.every(1, part), sgd()),
    "late": lambda part: gf.chain(gf.mean_rows(), gf.late(part, 0), sgd()),
    "not the last": lambda part: gf.chain(gf.mean_rows(), part, flip(), sgd()),
}


def counters(state):
    return {k: int(v) for k, v in gf.state_dict(state).items() if k.split(".")[-1] == "calls"}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("donate", [False, True])
def test_inside_other_transforms_skipped_steps_count_and_change_nothing_else(nested, donate):
    update = NESTED[nested](gf.every(2, gf.agc_clip(0.01)))
    params = make_params()
    state = update.init(params)
    for i in range(5):
        keep = torch.tensor(i % 3 == 2)
        old = copy.deepcopy((params, gf.state_dict(state)))
        params, state, _ = update(
            params, state, make_rows(params), donate=donate, keep=keep, on=torch.tensor(True)
        )
        assert set(counters(state).values()) == {i + 1}
        if not keep:
            assert all(torch.equal(params[n], p) for n, p in old[0].items())
            changed = [k for k, v in gf.state_dict(state).items() if not torch.equal(v, old[1][k])]
            assert changed == list(counters(state))
        assert all(leaf.device.type == "cpu" for leaf in gf.state_dict(state).values())


def norms():
    """Remember the largest norm that was seen."""

    def update(grads, state, params, /, **extra):
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        return grads, {"largest": torch.maximum(state["largest"], norm)}, {}

    return gf.transform(
        "norms", "tree -> tree", update, observes=True,
        init=lambda params: {"largest": torch.zeros(())},
    )  # fmt: skip


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("donate", [False, True])
def test_an_observer_sees_skipped_steps(nested, donate):
    update = NESTED[nested](norms())
    params = make_params()
    state = update.init(params)
    seen = []
    for i in range(4):
        rows = {n: (1 + i) * r for n, r in make_rows(params).items()}
        old = copy.deepcopy((params, gf.state_dict(state)))
        params, state, _ = update(
            params, state, rows, donate=donate, keep=torch.tensor(False), on=torch.tensor(True)
        )
        flat = gf.state_dict(state)
        assert all(torch.equal(params[n], p) for n, p in old[0].items())
        for key, value in flat.items():
            observed = key.split(".")[-1] in ("largest", "calls")
            assert torch.equal(value, old[1][key]) != observed, key
        seen += [float(v) for k, v in flat.items() if k.endswith("largest")]
    assert seen == sorted(seen) and len(set(seen)) == 4


def test_scheduled_transforms_keep_their_rules():
    update = gf.chain(
        gf.mean_rows(), gf.scheduled(observing_scale, factor=linear(1.0, 10)), gf.sgd(0.1)
    )
    params = make_params()
    state = update.init(params)
    _, after, _ = update(params, state, make_rows(params), keep=torch.tensor(False))
    flat, old = gf.state_dict(after), gf.state_dict(state)
    changed = [key for key in flat if not torch.equal(flat[key], old[key])]
    assert changed == ["scale.link.seen"]


def observing_scale(factor):
    def update(grads, state, params, /, **extra):
        return {n: factor * g for n, g in grads.items()}, {"seen": state["seen"] + 1}, {}

    return gf.transform(
        "scale", "tree -> tree", update, observes=True,
        init=lambda params: {"seen": torch.zeros(())},
    )  # fmt: skip


@pytest.mark.parametrize("part", [gf.every, lambda k, part: gf.late(part, k)])
def test_a_counter_on_the_cpu_does_not_wait_for_keep_of_a_device(part):
    update = gf.chain(gf.mean_rows(), part(2, flip()), sgd())
    state = update.init(make_params())
    name = next(name for name in state if "calls" in state[name])
    keep = torch.ones((), dtype=torch.bool, device="meta")  # nothing can be copied from it
    new = {name: {**state[name], "calls": state[name]["calls"] + 1}}
    assert int(settled(update.rules, keep, new, {name: state[name]})[name]["calls"]) == 1
