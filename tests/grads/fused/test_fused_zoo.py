"""Every model of the zoo and every question, in several orders: plan "fused" against the loop."""

import copy
import re

import pytest
import torch

import gradfilter as gf
from _zoo import every_case
from _zoo_case import PLAN
from _zoo_check import ORDERS, QUESTIONS, Oracle, probe_for

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # What has neither a rule nor a batching rule in torch is looped over inside vmap: slow, exact.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def unchanged(model):
    """Asserts, when called, that the module is as it was."""
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]

    def check(where):
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in state.items()), where
        assert [m.training for m in model.modules()] == modes, where
        assert all(p.grad is None for p in model.parameters()), where

    return check


@every_case
def test_fused_equals_loop(case):
    model = case.model()
    check_unchanged = unchanged(model)
    for size, (m, b) in enumerate(case.sizes):
        batch = case.samples(m, b)
        loop = case.rows(model, batch, m, b, "loop")
        oracle = Oracle(loop, probe_for(gf.extract(model)[0], m), case.rtol)
        assert (oracle.norms > 0).all(), f"{case.name}: a case without gradients"
        # At the first size every question comes first once, and once nothing may be kept between
        # questions; at the others come the orders that differ most.
        alone = [] if case.large else [(name,) for name in QUESTIONS]
        kept = alone + ORDERS if size == 0 else ORDERS[1:3]
        lean = ORDERS[2:] if size == 0 else []
        for order, options in [(o, {}) for o in kept] + [(o, {"memory_budget": 0}) for o in lean]:
            where = f"{case.name}, M = {m}, B = {b}, {' -> '.join(order)}, {options}"
            try:
                # A refusal comes at once: a lazy one would come too late for plan "auto".
                rows = case.rows(model, batch, m, b, PLAN, **options)
            except RuntimeError as refusal:
                if case.may_refuse is None:
                    raise
                assert re.search(case.may_refuse, str(refusal)), f"{where}: {refusal}"
                return
            oracle.check_pass(rows, where)
            for question in order:
                oracle.check(rows, question, where)
            if PLAN == "fused":
                taken = {rule for rule, count in rows.overrides.items() if count > 0}
                missing = set(case.rules.split()) - taken
                assert not missing, f"{where}: not taken {missing}, taken {taken}"
        check_unchanged(f"{case.name}, M = {m}, B = {b}")
