"""Transforms in some calls only: what rests is not computed, and skipped steps count."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _cases import make_params, make_rows
from _formulas import formulas
from _models import vectors
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")


def sgd():
    return gf.sgd(0.1, momentum=0.9)


def counted(transform):
    """Return a transform that counts its calls, and the list of the counts."""
    calls = []

    def update(grads, state, params, /, **extra):
        calls.append(len(calls))
        return transform.update(grads, state, params, **extra)

    made = gf.transform(
        transform.name, transform.kind, update, init=transform.init, publishes=transform.publishes
    )
    return made, calls


# --- Which calls, and what they cost ---


@pytest.mark.parametrize(("k", "expected"), [(1, 8), (2, 4), (3, 3), (10, 1)])
def test_every_runs_in_the_calls_0_k_2k(k, expected):
    clip, calls = counted(gf.agc_clip(0.01))
    update = gf.chain(gf.every(k, clip), sgd())
    params = make_params()
    state, moments = update.init(params), []
    for seed in range(8):
        before = len(calls)
        params, state, _ = update(params, state, {n: p + seed for n, p in params.items()})
        moments.append(len(calls) > before)
    assert len(calls) == expected
    assert moments == [i % k == 0 for i in range(8)]


@pytest.mark.parametrize("start", [0, 3, 20])
def test_late_runs_from_its_start_on(start):
    clip, calls = counted(gf.agc_clip(0.01))
    update = gf.chain(gf.late(clip, start), sgd())
    params = make_params()
    state = update.init(params)
    for _ in range(8):
        params, state, _ = update(params, state, {n: p + 0.1 for n, p in params.items()})
    assert len(calls) == max(0, 8 - start)


@pytest.mark.parametrize("per_row", [False, True])
def test_sam_that_rests_makes_no_second_pass(per_row):
    passes = []

    class Net(nn.Linear):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    model = Net(6, 3)
    sam = gf.sam_perturb(0.05, per_microbatch=per_row)
    first = [gf.every(4, sam), gf.mean_rows()] if per_row else [gf.mean_rows(), gf.every(4, sam)]
    step = gf.train_step(
        gf.model_loss(model, F.cross_entropy), gf.chain(*first, sgd()), microbatches=3, plan="loop"
    )
    state = step.init(model)
    passes.clear()
    counts = []
    for _ in range(8):
        before = len(passes)
        state, _ = step(state, vectors())
        counts.append(len(passes) - before)
    assert counts == [6, 3, 3, 3, 6, 3, 3, 3]


def test_steps_are_those_of_two_chains_in_turn():
    sam = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), sgd())
    plain = gf.chain(gf.mean_rows(), sgd())
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loss = gf.model_loss(model, F.cross_entropy)
    steps = [gf.train_step(loss, chain, microbatches=3) for chain in (sam, plain)]
    mixed = gf.train_step(
        loss, gf.chain(gf.mean_rows(), gf.every(2, gf.sam_perturb(0.05)), sgd()), microbatches=3
    )
    state, own = steps[0].init(model, seed=0), mixed.init(model, seed=0)
    for i in range(5):
        batch = vectors()
        step = steps[i % 2]
        kept = step.update.init(state["params"])
        state["transforms"] = {**kept, "sgd": state["transforms"]["sgd"]}
        state, _ = step(state, batch)
        own, _ = mixed(own, batch)
        torch.testing.assert_close(own["params"], state["params"], rtol=0, atol=0)


def test_the_other_transform_runs_between_and_states_wait():
    update = gf.every(3, sgd(), gf.adam(0.01))
    params = make_params()
    state, own, other = update.init(params), sgd().init(params), gf.adam(0.01).init(params)
    expected = params
    for i in range(7):
        grads = {n: (i + 1) * p for n, p in params.items()}
        params, state, _ = update(params, state, grads)
        with formulas():
            if i % 3 == 0:
                expected, own, _ = sgd()(expected, own, grads)
            else:
                expected, other, _ = gf.adam(0.01)(expected, other, grads)
        torch.testing.assert_close(params, expected, rtol=0, atol=0)
        torch.testing.assert_close(state["transform"], own, rtol=0, atol=0)
        torch.testing.assert_close(state["otherwise"], other, rtol=0, atol=0)
        assert int(state["calls"]) == i + 1


def test_a_reducer_that_rests_gives_the_mean_and_keeps_the_step():
    update = gf.chain(gf.every(2, gf.agree_filter(0.0)), gf.sgd(1.0))
    params = make_params()
    rows, state, before = make_rows(params), update.init(params), params
    params, state, info = update(params, state, rows)
    assert not info["keep"] and "agree_filter/accepted" in info
    params, state, info = update(params, state, rows)
    assert info["keep"] and "agree_filter/accepted" not in info
    for name, row in rows.items():
        torch.testing.assert_close(params[name], before[name] - row.mean(0))


def test_skipped_steps_count():
    update = gf.chain(gf.mean_rows(), gf.every(2, gf.agc_clip(0.01)), sgd())
    params = make_params()
    state = update.init(params)
    for i in range(4):
        new, after, info = update(params, state, make_rows(params), keep=torch.tensor(i == 3))
        assert int(after["agc_clip"]["calls"]) == i + 1
        assert ("agc_clip/clipped_fraction" in info) == (i % 2 == 0)
        if i < 3:
            assert all(torch.equal(new[n], p) for n, p in params.items())
            flat, old = gf.state_dict(after), gf.state_dict(state)
            assert [k for k in flat if not torch.equal(flat[k], old[k])] == ["agc_clip.calls"]
        state = after


def test_a_resumed_run_goes_on_at_its_call():
    update = gf.chain(gf.mean_rows(), gf.every(3, gf.agc_clip(0.01)), sgd())
    params = make_params()
    state = update.init(params)
    for _ in range(2):
        params, state, _ = update(params, state, make_rows(params))
    again = gf.load_state_dict(update.init(params), gf.state_dict(state))
    shown = []
    for _ in range(4):
        params, again, info = update(params, again, make_rows(params))
        shown.append("agc_clip/clipped_fraction" in info)
    assert shown == [False, True, False, False]


def test_filtered_counts_the_steps_that_it_skips():
    model = nn.Linear(6, 3)
    chain = gf.chain(gf.agree_filter(0.0), gf.every(2, gf.agc_clip(0.01)))
    host = Filtered(model, F.cross_entropy, chain, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    shown = []
    for _ in range(4):
        result = host.step(*vectors())
        assert not result.info["keep"]
        shown.append("agc_clip/clipped_fraction" in result.info)
    assert shown == [True, False, True, False]


@pytest.mark.parametrize("compile", [False, "graph"])
def test_a_compiled_filtered_has_one_graph_per_branch(compile):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    chain = gf.chain(gf.mean_rows(), gf.every(3, gf.sam_perturb(0.05)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = Filtered(model, F.cross_entropy, chain, optimizer, 3, compile=compile)
    for _ in range(7):
        host.step(*vectors())
    assert int(host.state_dict()["transforms"]["sam_perturb.calls"]) == 7
    if compile:
        assert len(host._graphs.entries) == 2


# --- Errors ---


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: gf.every(0, gf.agc_clip(0.01)), ValueError, "k as a whole number >= 1, found 0"),
        (lambda: gf.every(True, gf.agc_clip(0.01)), ValueError, "found True"),
        (lambda: gf.every(2.0, gf.agc_clip(0.01)), ValueError, r"found 2\.0"),
        (lambda: gf.late(gf.agc_clip(0.01), -1), ValueError, "start as a whole number >= 0"),
        (lambda: gf.every(2, gf.agc_clip), TypeError, "expected a transform, found function"),
        (lambda: gf.every(2, gf.mean_rows(), gf.agc_clip(0.1)), TypeError, "two transforms of one"),
        (lambda: gf.late(gf.freeze(), 2), TypeError, "may be an update rule or follow one"),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_counter_that_the_host_cannot_read_is_refused():
    update = gf.chain(gf.every(2, gf.agc_clip(0.01)), gf.sgd(0.1))
    params = make_params()
    state = update.init(params)

    def step(params, calls):
        own = {**state, "agc_clip": {**state["agc_clip"], "calls": calls}}
        return update(params, own, params)[0]

    batched = {n: torch.stack([p, p]) for n, p in params.items()}
    torch.func.vmap(step, in_dims=(0, None))(batched, torch.zeros((), dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"inside a trace, torch\.func\.vmap or a capture"):
        torch.func.vmap(step)(batched, torch.zeros(2, dtype=torch.int64))
    moved = {"agc_clip": {**state["agc_clip"], "calls": torch.zeros((), device="meta")}}
    with pytest.raises(RuntimeError, match="as a tensor on the CPU that the host can read"):
        update(params, {**state, **moved}, params)


def test_a_compiled_update_without_fullgraph_takes_both_branches():
    update = gf.chain(gf.every(2, gf.agc_clip(0.01)), gf.sgd(0.1))
    params = found = make_params()
    state = own = update.init(params)
    compiled = torch.compile(update, backend="eager")
    for _ in range(4):
        params, state, _ = update(params, state, params)
        found, own, _ = compiled(found, own, found)
        torch.testing.assert_close(found, params)


def test_it_prints_as_it_was_written_and_takes_part_in_hyperparameters():
    update = gf.every(2, gf.sam_perturb(0.05))
    assert repr(update) == "every(k=2, transform=sam_perturb(rho=0.05))"
    assert repr(gf.late(gf.agc_clip(0.01), 5)) == "late(transform=agc_clip(clipping=0.01), start=5)"
    found = gf.hyperparameters(gf.chain(gf.mean_rows(), update, gf.sgd(0.1)))
    assert (found["sam_perturb/k"], found["sam_perturb/transform/rho"]) == (2, 0.05)
