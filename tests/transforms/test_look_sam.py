"""`look_sam` against a plain loop: which steps make a second pass, and what the others reuse."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, flat, normal_tree, run, unflat
from _regression import SHAPES, ascent, make_batch, make_params, make_rows, problem, rows_at
from _sam_by_hand import MICROBATCHES, ByHand, batches, net, sgd, train_step_of
from gradfilter.interop import Filtered

FORMS = [(None, 0.3, 0.01), ("asam", 0.5, 0.01), ("asam", 0.5, 0.0), ("gsam", 0.4, 0.01)]
every_form = pytest.mark.parametrize(("adaptive", "rho", "eta"), FORMS)


def orthogonal(h, g):
    return h - (g @ h) / (g @ g) * g


def unit(vector):
    return vector / vector.norm()


# --- Against loops ---


@every_form
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.7), (2, 0.7), (5, 0.3)])
def test_thirty_steps_are_those_of_a_plain_loop(adaptive, rho, eta, k, alpha):
    model = net()
    hand = ByHand(model, sgd)
    step = train_step_of(model, gf.look_sam(rho, k, alpha, adaptive=adaptive, eta=eta))
    state, reused = step.init(model), None
    for t, batch in enumerate(batches(30)):
        g = hand.gradient(batch)
        if t % k == 0:
            h = hand.gradient(batch, ascent(hand.weights, g, rho, adaptive, eta))
            reused = orthogonal(h, g)
            hand.step(h)
        else:
            hand.step(g + alpha * g.norm() / reused.norm() * reused)
        state, _ = step(state, batch)
        assert_close(flat(state["params"]), hand.weights, rtol=1e-7, atol=1e-9)
    direction = flat(state["transforms"]["look_sam"]["direction"])
    assert_close(direction, unit(reused), rtol=1e-6, atol=1e-7)


def test_k_1_is_sam_and_alpha_0_is_sam_in_some_of_the_steps():
    model = net()
    for look, same in (
        (gf.look_sam(0.3, 1), gf.sam_perturb(0.3)),
        (gf.look_sam(0.3, 3, 0.0), gf.every(3, gf.sam_perturb(0.3))),
    ):
        one, two = train_step_of(model, look), train_step_of(model, same)
        state, expected = one.init(model), two.init(model)
        for batch in batches(7):
            state, _ = one(state, batch)
            expected, _ = two(expected, batch)
            assert_same(state["params"], expected["params"])


def test_the_weights_of_a_filter_and_clipped_rows():
    params, batch, rows, w, losses, grads = problem(2)
    limit = grads.norm(dim=1).median().item()
    factors = (limit / grads.norm(dim=1)).clamp(max=1)
    update = gf.chain(gf.clip_per_row(limit), gf.agree_filter(1.0), gf.look_sam(0.4, 2))
    h, state, out = update.update(rows, update.init(params), params)
    weights = out["weights"] * factors
    g = weights @ grads
    near_losses, near_grads = rows_at(w + ascent(w, g, 0.4), batch)
    assert_close(flat(h), weights @ near_grads)
    gap = out["weights"] @ (near_losses - losses)
    assert_close(out["look_sam/surrogate_gap"], gap, rtol=1e-8)
    again, _, out = update.update(rows, state, params)
    v = orthogonal(weights @ near_grads, g)
    assert_close(flat(again), g + 0.7 * g.norm() * unit(v))
    assert "look_sam/surrogate_gap" not in out
    assert_close(flat(out["clean_grads"]), g)


def test_gradients_of_grad_fn_are_asked_for_in_some_of_the_steps():
    params, g, h = normal_tree(0), normal_tree(1), normal_tree(2)
    link, asked = gf.look_sam(0.3, 3), []
    state = link.init(params)
    for _ in range(5):
        given, state, out = link.update(g, state, params, grad_fn=lambda p: asked.append(p) or h)
        assert out["clean_grads"] is g
    assert len(asked) == 2
    assert_close(flat(asked[0]) - flat(params), ascent(flat(params), flat(g), 0.3), atol=1e-14)
    bent = flat(g) + 0.7 * flat(g).norm() * unit(orthogonal(flat(h), flat(g)))
    assert_close(flat(given), bent)


# --- The passes ---


def test_steps_without_a_second_pass_make_none():
    passes = []

    class Net(nn.Linear):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    model = Net(6, 3).double()
    step, counts = train_step_of(model, gf.look_sam(0.05, 4), plan="loop"), []
    state = step.init(model)
    for batch in batches(9):
        passes.clear()
        state, _ = step(state, batch)
        counts.append(len(passes))
    assert counts == [6, 3, 3, 3, 6, 3, 3, 3, 6]


@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_step_has_a_graph_without_a_second_pass(donate):
    model = net()
    step = train_step_of(model, gf.look_sam(0.3, 3), plan="loop")
    compiled = gf.compile(step, backend="graph")
    state, own = step.init(model), step.init(model)
    for batch in batches(7):
        state, info = step(state, batch)
        own, found = compiled(own, batch, donate=donate)
        assert_close(own["params"], state["params"])
        assert_close(own["transforms"], state["transforms"])
        assert found.keys() == info.keys()
    graphs = [e.trace.graph.graph for found in compiled.graphs.entries.values() for e in found]
    sizes = [sum("tanh" in str(node.target) for node in graph.nodes) for graph in graphs]
    assert sorted(sizes) == [2 * MICROBATCHES, 4 * MICROBATCHES]  # with the backward passes
    assert int(own["transforms"]["look_sam"]["calls"]) == 7


def test_rows_of_the_batch_in_parts():
    model = net()
    steps = [train_step_of(model, gf.look_sam(0.3, 2), rows_at_once=size) for size in (None, 2)]
    states = [step.init(model) for step in steps]
    for batch in batches(4):
        states = [step(state, batch)[0] for step, state in zip(steps, states, strict=True)]
        assert_close(states[1]["params"], states[0]["params"])
        assert_close(states[1]["transforms"], states[0]["transforms"])


@pytest.mark.filterwarnings("ignore:.*trace number")  # a graph for every pair of branches
def test_it_may_rest_itself():
    model = net()
    step = train_step_of(model, gf.every(2, gf.look_sam(0.3, 2)))
    compiled = gf.compile(step, backend="graph")
    state, own, shown = step.init(model), step.init(model), []
    for batch in batches(6):
        state, info = step(state, batch)
        own, _ = compiled(own, batch)
        assert_close(own["params"], state["params"])
        shown.append("look_sam/surrogate_gap" in info)
    assert shown == [True, False, False, False, True, False]
    assert int(state["transforms"]["look_sam"]["transform"]["calls"]) == 3


@pytest.mark.parametrize("compile", [False, "graph"])
def test_beside_an_optimizer_of_torch(compile):
    model = nn.Linear(6, 3).double()
    chain = gf.chain(gf.mean_rows(), gf.look_sam(0.05, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = Filtered(model, F.cross_entropy, chain, optimizer, 3, compile=compile)
    shown = ["look_sam/surrogate_gap" in host.step(x, y).info for x, y in batches(7)]
    assert shown == [True, False, False, True, False, False, True]
    assert int(host.state_dict()["transforms"]["look_sam.calls"]) == 7


# --- Skipped steps, and the counter ---


def test_before_the_first_second_pass_is_applied_the_gradient_is_plain():
    params, batch = make_params(), make_batch()
    update = gf.chain(gf.mean_rows(), gf.look_sam(0.4, 3), gf.sgd(0.1))
    plain = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    rows = make_rows(params, batch)
    moved, state, _ = update(params, update.init(params), rows, keep=torch.tensor(False))
    assert_same(moved, params)
    assert_same(flat(state["look_sam"]["direction"]), torch.zeros_like(flat(params)))
    for _ in range(2):
        rows = make_rows(params, batch)
        expected, _, _ = plain(params, plain.init(params), rows)
        params, state, info = update(params, state, rows)
        assert_same(params, expected)
    params, state, info = update(params, state, make_rows(params, batch))
    assert "look_sam/surrogate_gap" in info and flat(state["look_sam"]["direction"]).norm() > 0.9


def test_a_skipped_second_pass_leaves_the_old_direction():
    params = make_params()
    update = gf.chain(gf.mean_rows(), gf.look_sam(0.4, 2), gf.sgd(0.1))
    state, directions = update.init(params), []
    for k in range(6):
        rows, keep = make_rows(params, make_batch(10 * k)), torch.tensor(k != 2)
        params, state, info = update(params, state, rows, keep=keep)
        assert ("look_sam/surrogate_gap" in info) == (k % 2 == 0)
        assert state["look_sam"]["calls"] == k + 1
        directions.append(flat(state["look_sam"]["direction"]))
    assert all(torch.equal(directions[0], old) for old in directions[1:4])
    assert not torch.equal(directions[4], directions[3])
    assert torch.equal(directions[5], directions[4])


def test_a_resumed_run_continues_at_its_call():
    model, given = net(), batches(8)
    step = train_step_of(model, gf.look_sam(0.3, 3))
    state = step.init(model)
    for batch in given[:2]:
        state, _ = step(state, batch)
    saved = {name: leaf.clone() for name, leaf in gf.state_dict(state).items()}
    again, shown = gf.load_state_dict(step.init(model), saved), []
    for batch in given[2:]:
        state, _ = step(state, batch)
        again, info = step(again, batch)
        shown.append("look_sam/surrogate_gap" in info)
        assert_same(again["params"], state["params"])
    assert shown == [False, True, False, False, True, False]


def test_a_count_of_the_caller_does_not_move_the_counter():
    params, update = make_params(), gf.chain(gf.mean_rows(), gf.look_sam(0.3, 2), gf.sgd(0.1))
    state, shown = update.init(params), []
    for _ in range(3):
        rows = make_rows(params, make_batch())
        params, state, info = update(params, state, rows, count=torch.tensor(7))
        shown.append("look_sam/surrogate_gap" in info)
    assert shown == [True, False, True]


def test_a_counter_that_the_host_cannot_read_is_refused():
    params, link = normal_tree(0), gf.look_sam(0.3, 2)
    state = {**link.init(params), "calls": torch.zeros((), device="meta")}
    with pytest.raises(RuntimeError, match=r"counter of every\(\), late\(\) or look_sam\(\)"):
        link.update(params, state, params)


# --- Properties and edges ---


def reused(g, h, params, alpha=0.7):
    """Return the direction that a pair of gradients leaves, and the result of the next call."""
    link = gf.look_sam(0.5, 2, alpha)
    _, state, _ = link.update(g, link.init(params), params, grad_fn=lambda p: h)
    found, _, _ = link.update(g, state, params)
    return state["direction"], found


@given(seed=st.integers(0, 2**20), alpha=st.floats(0, 3))
def test_what_is_reused_is_orthogonal_and_as_long_as_alpha_says(seed, alpha):
    params, g, h = (normal_tree(seed + i) for i in range(3))
    direction, found = reused(g, h, params, alpha)
    u, g, h = flat(direction), flat(g), flat(h)
    assert_close(u.norm().item(), 1.0)
    assert abs(u @ g) <= 1e-12 * g.norm()
    assert_close(u @ h, orthogonal(h, g).norm())
    added = flat(found) - g
    assert_close(added, alpha * g.norm() * u, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1 / 3, 0.0])
def test_parallel_gradients_leave_no_direction(factor):
    params, g = normal_tree(0), normal_tree(1)
    direction, found = reused(g, {name: factor * leaf for name, leaf in g.items()}, params)
    assert_same(flat(direction), torch.zeros_like(flat(direction)))
    assert_same(found, g)


@every_form
def test_a_zero_gradient_stays_finite(adaptive, rho, eta):
    params, h = normal_tree(0), normal_tree(1)
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    link = gf.look_sam(rho, 2, adaptive=adaptive, eta=eta)
    found, state, _ = link.update(zero, link.init(params), params, grad_fn=lambda p: h)
    assert_same(found, h)
    assert_close(flat(state["direction"]), unit(flat(h)))
    assert_same(link.update(zero, state, params)[0], zero)


def test_what_is_not_finite_is_not_hidden():
    params, g, h = (normal_tree(i) for i in range(3))
    link = gf.look_sam(0.5, 2)
    _, state, _ = link.update(g, link.init(params), params, grad_fn=lambda p: h)
    bad = {**g, "scale": torch.full_like(g["scale"], torch.nan)}
    assert flat(link.update(bad, state, params)[0]).isnan().all()
    update = gf.chain(gf.look_sam(0.5, 2), gf.finite_filter(), gf.sgd(0.1))
    moved, after, info = update(params, update.init(params), g, grad_fn=lambda p: bad)
    assert not info["keep"]
    assert_same((moved, after["look_sam"]["direction"]), (params, link.init(params)["direction"]))


def test_rows_that_are_not_finite_are_removed_before():
    params, batch, rows, w, _, grads = problem(3, bad=(1,))
    good = [0, 2, 3]
    update = gf.chain(gf.finite_filter(), gf.mean_rows(), gf.look_sam(0.2, 2))
    h, state, _ = update.update(rows, update.init(params), params)
    g = grads[good].mean(0)
    near = rows_at(w + ascent(w, g, 0.2), batch)[1][good].mean(0)
    assert_close(flat(h), near)
    found, _, _ = update.update(rows, state, params)
    assert_close(flat(found), g + 0.7 * g.norm() * unit(orthogonal(near, g)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_direction_is_float32_or_wider(dtype):
    params, g, h = (
        {name: leaf.to(dtype) for name, leaf in normal_tree(i).items()} for i in range(3)
    )
    direction, found = reused(g, h, params)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(leaf.dtype == wide for leaf in direction.values())
    assert all(leaf.dtype == dtype for leaf in found.values())
    g, h = flat(g).double(), flat(h).double()
    u = unit(orthogonal(h, g))
    assert_close(flat(direction).double(), u, rtol=1e-5, atol=1e-6)
    expected = (g + 0.7 * g.norm() * u).to(dtype)
    assert_close(flat(found), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_scheduled_radius_and_alpha():
    schedule = gf.schedules.linear(0.8, 6, min_value=0.2)
    link = gf.scheduled(gf.look_sam, rho=schedule, k=2, alpha=schedule)
    params, g = make_params(), make_params(1)
    h = make_params(2)
    state, near = link.init(params), []
    for k in range(4):
        found, state, _ = link.update(g, state, params, grad_fn=lambda p: near.append(p) or h)
        if k % 2 == 0:
            expected = ascent(flat(params), flat(g), schedule(k).item())
            assert_close(flat(near[-1]) - flat(params), expected, atol=1e-14)
            assert_same(found, h)
        else:
            u = unit(orthogonal(flat(h), flat(g)))
            assert_close(flat(found), flat(g) + schedule(k).item() * flat(g).norm() * u)
    assert len(near) == 2


# --- Errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "look_sam: expected 0 <= rho, found rho=-0.1"),
        ({"rho": 0.1, "k": 0}, "look_sam: expected k as a whole number >= 1, found 0"),
        ({"rho": 0.1, "k": 2.0}, r"look_sam: expected k as a whole number >= 1, found 2\.0"),
        ({"rho": 0.1, "alpha": -1}, "look_sam: expected 0 <= alpha, found alpha=-1"),
        ({"rho": 0.1, "eta": -1}, "look_sam: expected 0 <= eta"),
        ({"rho": 0.1, "adaptive": "sam"}, r"look_sam: .* found 'sam'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.look_sam(**arguments)


def test_rows_are_refused():
    params, rows = make_params(), make_rows(make_params(), make_batch())
    with pytest.raises(TypeError, match="look_sam: rows reach a transform that takes one gradient"):
        run(gf.look_sam(0.1), rows, params)
    with pytest.raises(ValueError, match=r"look_sam: expected the weights .* Put look_sam behind"):
        run(gf.look_sam(0.1), unflat(flat(params), SHAPES), params)


# --- Another implementation ---


@pytest.mark.slow
@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.3), (True, 0.5)])
def test_steps_are_those_of_pytorch_optimizer(adaptive, rho):
    others = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()  # it has one direction for each tensor
    make = lambda params: others.LookSAM(
        params, torch.optim.SGD, rho=rho, k=4, alpha=0.6, adaptive=adaptive, lr=0.1, momentum=0.9
    )
    hand, form = ByHand(model, make), "asam" if adaptive else None
    step = train_step_of(model, gf.look_sam(rho, 4, 0.6, adaptive=form, eta=0.0))
    state = step.init(model)
    for batch in batches(30):
        hand.gradient(batch)
        hand.optimizer.step(lambda batch=batch: hand.gradient(batch))
        state, _ = step(state, batch)
        # Its norms are in float32, and it divides by ‖v‖ + 1e-8.
        assert_close(flat(state["params"]), hand.weights, rtol=1e-5, atol=1e-6)
