"""A state of the loss that no search finds: refused, because a pass that runs twice differs."""

import collections
import functools
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _allocations import Peak
from _plain import module_rows
from gradfilter.grads import _hidden_state
from gradfilter.grads._hidden_state import Probes, nearly_equal
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")
M = 4


def array():
    calls = np.zeros(1)

    def count():
        calls[0] += 1
        return float(calls[0])

    return count


def container(make, add):
    calls = make()

    def count():
        add(calls)
        return len(calls)

    return count


def generator():
    def numbers():
        yield from itertools.count(1)

    calls = numbers()
    return lambda: next(calls)


def cached():
    calls = itertools.count(1)

    @functools.lru_cache
    def counter():
        return [0, calls]

    return lambda: next(counter()[1])


def tensors_attribute():
    holder = torch.zeros(())
    holder.calls = 0

    def count():
        holder.calls += 1
        return holder.calls

    return count


COUNTERS = {
    "iterator": lambda: functools.partial(next, itertools.count(1)),
    "list iterator": lambda: functools.partial(next, iter([1, 2, 3, 4, 5, 6])),
    "array": array,
    "set": lambda: container(set, lambda calls: calls.add(len(calls))),
    "bytearray": lambda: container(bytearray, lambda calls: calls.append(1)),
    "length of a log": lambda: container(list, lambda calls: calls.append(1)),
    "length of a deque": lambda: container(collections.deque, lambda calls: calls.append(1)),
    "generator": generator,
    "cached": cached,
    "attribute of a tensor": tensors_attribute,
}


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def criterion_of(count):
    return lambda output, targets: count() * F.mse_loss(output, targets)


def plain_rows(criterion):
    return module_rows(net(), criterion, batch(), M)[1]


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap"])
@pytest.mark.parametrize("name", COUNTERS)
def test_it_is_refused_by_every_pass_over_all_rows(name, plan):
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, criterion_of(COUNTERS[name]()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, RuntimeError)) as caught:
            gf.microbatch_grads(loss, M, plan=plan)(params, batch())
    assert 'plan="loop"' in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize("name", COUNTERS)
def test_the_loop_is_that_of_plain_backward_passes(name):
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, criterion_of(COUNTERS[name]()))
    rows = gf.microbatch_grads(loss, M, plan="loop")(params, batch())
    want = plain_rows(criterion_of(COUNTERS[name]()))
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap"])
def test_a_state_that_changes_only_gradients_is_refused(plan):
    calls = itertools.count(1)

    def criterion(output, targets):
        still = output.detach()
        return F.mse_loss(still + next(calls) * (output - still), targets)

    model = net()
    params, _ = gf.extract(model)
    with pytest.raises(ValueError, match='plan="loop" from the start'):
        gf.microbatch_grads(gf.model_loss(model, criterion), M, plan=plan)(params, batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slow_changes_in_low_precision_are_refused(dtype):
    calls, change = itertools.count(1), 10 * torch.finfo(dtype).eps

    def criterion(output, targets):
        return F.mse_loss(output, targets) * (1 + change * next(calls))

    model = net().to(dtype)
    params, _ = gf.extract(model)
    data = tuple(t.to(dtype) for t in batch())
    with pytest.raises(ValueError, match='plan="loop" from the start'):
        gf.microbatch_grads(gf.model_loss(model, criterion), M)(params, data)


def test_a_state_before_a_fallback_is_refused_and_not_advanced_in_silence():
    calls = itertools.count(1)

    def criterion(output, targets):
        loss = F.mse_loss(output, targets) * next(calls)
        return loss * (1 + loss.item())  # refused by every pass over all rows

    model = net()
    params, _ = gf.extract(model)
    with pytest.raises(ValueError, match='plan="loop" from the start'):
        gf.microbatch_grads(gf.model_loss(model, criterion), M)(params, batch())


LOG = []


@pytest.mark.parametrize("refused", [False, True])
def test_a_log_has_one_entry_per_call_of_the_result(refused):
    """Refused passes leave nothing in it, and probing passes take nothing from it."""
    LOG.clear()

    def criterion(output, targets):
        loss = F.mse_loss(output, targets)
        LOG.append(loss.detach())
        return loss * (1 + loss.item() if refused else 1.0)

    model = net()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), M)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            grads_of(params, batch())
    assert len(LOG) == (3 * M if refused else 3)
    assert not refused or all(entry.ndim == 0 for entry in LOG)


class Remembers:
    """Holds a list that its function closes over as well: its length scales the loss."""

    def __init__(self):
        self.seen = LOG

    def __call__(self, output, targets):
        LOG.append(1)
        return F.mse_loss(output, targets) * len(self.seen)


def test_a_list_that_is_reached_in_two_ways_is_a_state():
    LOG.clear()
    want = plain_rows(Remembers())
    LOG.clear()
    model = net()
    params, _ = gf.extract(model)
    with pytest.warns(UserWarning, match="changes attribute 'criterion.seen'"):
        rows = gf.microbatch_grads(gf.model_loss(model, Remembers()), M)(params, batch())
    torch.testing.assert_close(rows.stacked(), want, rtol=1e-12, atol=1e-12)
    assert len(LOG) == M


def test_one_row_sees_the_state_as_it_is():
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, criterion_of(COUNTERS["iterator"]()))
    grads_of = gf.microbatch_grads(loss, 1)
    first, second = (grads_of(params, batch()).losses for _ in range(2))
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap"])
def test_the_first_second_and_fourth_pass_run_twice(plan):
    calls = itertools.count()

    def criterion(output, targets):
        next(calls)
        return F.mse_loss(output, targets)

    model = net()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), M, plan=plan)
    for _ in range(9):
        grads_of(params, batch())
    assert next(calls) == 9 + 4 * (1 + 2)  # at 1, 2, 4 and 8 a pass, and a row twice
    again = pickle.loads(pickle.dumps(Probes()))
    assert [again.due() for _ in range(9)] == [True, True, False, True, *[False] * 3, True, False]


def test_the_steps_of_filtered_count_as_passes_of_one_loss():
    calls = itertools.count()

    def criterion(output, targets):
        next(calls)
        return F.mse_loss(output, targets)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    filtered = Filtered(model, criterion, gf.mean_rows(), optimizer, M)
    for _ in range(9):
        filtered.step(*batch())
    assert next(calls) == 9 + 4 * (1 + 2)


def test_modules_and_functions_of_torch_run_once():
    calls = itertools.count()
    model = net()

    def count(*_):
        next(calls)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        params, _ = gf.extract(model)
        gf.microbatch_grads(gf.model_loss(model, F.mse_loss), M)(params, batch())
    finally:
        hook.remove()
    assert next(calls) == 1


def test_a_pass_that_runs_twice_changes_no_numbers_and_no_logs():
    log, model = [], nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def criterion(output, targets):
        log.append(len(targets))
        return F.mse_loss(output, targets)

    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), M)
    found = []
    for _ in range(3):  # the third pass runs once
        torch.manual_seed(3)
        found.append((grads_of(params, batch()).stacked(), torch.get_rng_state()))
    for (grads, state), (other, other_state) in itertools.pairwise(found):
        assert all(torch.equal(grads[name], other[name]) for name in grads)
        assert torch.equal(state, other_state)
    assert log == [2, 2, 2]


def test_a_partial_of_torchs_function_hides_no_state():
    """Its options are no functions, so no pass runs twice."""
    part, triplet = functools.partial, F.triplet_margin_with_distance_loss
    criteria = {
        part(F.cross_entropy, reduction="none"): False,
        part(part(F.cross_entropy, weight=torch.ones(3)), reduction="none"): False,
        part(triplet, distance_function=lambda a, b: (a - b).norm(dim=1)): True,
        part(criterion_of(lambda: 1)): True,
    }
    for criterion, may in criteria.items():
        loss = NormalizedLoss.of(gf.model_loss(net(), criterion), False)
        assert loss.may_draw_on_host is may


def test_a_comparison_holds_two_gradients_and_few_pieces(monkeypatch):
    """A large model fits where a plain step fits: the comparison makes no copies of all leaves."""
    monkeypatch.setattr(_hidden_state, "PIECE", 1024)
    model = nn.Linear(256, 256, bias=False)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, lambda output, y: (output - y).square().mean())
    grads_of = gf.microbatch_grads(loss, M)
    with Peak() as peak:
        grads_of(params, (torch.randn(M, 256), torch.randn(M, 256)), buffers=buffers)
    assert peak.peak < 3.5 * params["weight"].nbytes  # one gradient is held, one is accumulated


def test_leaves_are_compared_with_the_largest_number_of_all(monkeypatch):
    monkeypatch.setattr(_hidden_state, "PIECE", 2)
    eps = torch.finfo(torch.float64).eps
    large, small = torch.tensor([1.0, torch.nan, 100.0]), torch.tensor([1.0, 2.0])
    assert nearly_equal([large, small], [large.clone(), small + 1000 * eps])
    assert not nearly_equal([large, small], [large, small + 1e5 * eps])
    assert not nearly_equal(large, torch.tensor([1.0, torch.nan, 100.1]))
    assert nearly_equal([torch.zeros(0)], [torch.zeros(0)])
