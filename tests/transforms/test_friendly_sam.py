"""`friendly_sam` against a plain loop, and its memory of applied gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
from _naive import assert_close, assert_same, flat, normal_tree, run, unflat
from _regression import SHAPES, M, ascent, make_batch, make_params, make_rows, problem, rows_at
from _sam_by_hand import ByHand, batches, net, sgd, train_step_of

FORMS = [(None, 0.3, 0.01), ("asam", 0.5, 0.01), ("asam", 0.5, 0.0), ("gsam", 0.4, 0.01)]
every_form = pytest.mark.parametrize(("adaptive", "rho", "eta"), FORMS)


class Memory:
    """The average of gradients, as the authors' code has it, on flat vectors."""

    def __init__(self, sigma, decay):
        self.sigma, self.decay, self.average = sigma, decay, None

    def noise(self, g):
        """Return what the average does not explain of a gradient, which it then takes in."""
        if self.average is None:
            self.average = g
            return g
        d = g - self.sigma * self.average
        self.average = self.decay * self.average + (1 - self.decay) * g
        return d


# --- Against loops ---


@every_form
@pytest.mark.parametrize(("sigma", "decay"), [(1.0, 0.9), (0.6, 0.6), (0.0, 0.5)])
def test_thirty_steps_are_those_of_a_plain_loop(adaptive, rho, eta, sigma, decay):
    model = net()
    hand, memory = ByHand(model, sgd), Memory(sigma, decay)
    sharp = gf.friendly_sam(rho, sigma=sigma, decay=decay, adaptive=adaptive, eta=eta)
    step = train_step_of(model, sharp)
    state = step.init(model)
    for batch in batches(30):
        d = memory.noise(hand.gradient(batch))
        hand.step(hand.gradient(batch, ascent(hand.weights, d, rho, adaptive, eta)))
        state, _ = step(state, batch)
        assert_close(flat(state["params"]), hand.weights, rtol=1e-9, atol=1e-11)
    assert_close(flat(state["transforms"]["friendly_sam"]["average"]), memory.average, rtol=1e-9)


def test_it_differs_from_sam_from_the_second_step_on():
    model, moved = net(), []
    for sharp in (gf.friendly_sam(0.3), gf.sam_perturb(0.3)):
        step = train_step_of(model, sharp)
        state = step.init(model)
        for batch in batches(2):
            state, _ = step(state, batch)
            moved.append(flat(state["params"]))
    assert_same(moved[0], moved[2])
    assert (moved[1] - moved[3]).norm() > 1e-3


@every_form
def test_before_a_filter_the_rows_are_those_at_the_perturbed_point(adaptive, rho, eta):
    params = make_params()
    link = gf.friendly_sam(rho, sigma=0.8, decay=0.7, adaptive=adaptive, eta=eta)
    state, memory, w = link.init(params), Memory(0.8, 0.7), flat(params)
    for seed in range(4):
        batch = make_batch(10 * seed, bad=(1,) if seed == 2 else ())
        rows, good = make_rows(params, batch), [0, 2, 3] if seed == 2 else list(range(M))
        losses, grads = rows_at(w, batch)
        near = w + ascent(w, memory.noise(grads[good].mean(0)), rho, adaptive, eta)
        near_losses, near_grads = rows_at(near, batch)
        again, state, out = link.update(rows, state, params)
        assert_close(flat(again.stacked(), batch_dims=1)[good], near_grads[good])
        gap = (near_losses - losses)[good].mean()
        assert_close(out["surrogate_gap"], gap, rtol=1e-8)
        assert out["clean_grads"] is rows


def test_after_a_filter_the_second_gradient_has_the_same_weights():
    params, batch, rows, w, losses, grads = problem(2)
    chain = gf.chain(gf.agree_filter(1.0), gf.friendly_sam(0.4))
    state = chain.init(params)
    state["friendly_sam"]["average"] = unflat(0.3 * grads[0], SHAPES)
    state["friendly_sam"]["count"] += 1
    h, _, out = chain.update(rows, state, params)
    weights = out["weights"]
    assert 1 < out["agree_filter/accepted"].sum() < M
    near_losses, near_grads = rows_at(w + ascent(w, weights @ grads - 0.3 * grads[0], 0.4), batch)
    assert_close(flat(h), weights @ near_grads)
    gap = weights @ (near_losses - losses)
    assert_close(out["friendly_sam/surrogate_gap"], gap, rtol=1e-8)


def test_rows_clipped_before_stay_clipped():
    params, batch, rows, w, _, grads = problem()
    limit = grads.norm(dim=1).median().item()
    factors = (limit / grads.norm(dim=1)).clamp(max=1)[:, None]
    near = w + ascent(w, (factors * grads).mean(0), 0.3)
    expected = factors * rows_at(near, batch)[1]
    for links in ((gf.mean_rows(), gf.friendly_sam(0.3)), (gf.friendly_sam(0.3), gf.mean_rows())):
        h, _ = run(gf.chain(gf.clip_per_row(limit), *links), rows, params)
        assert_close(flat(h), expected.mean(0))


def test_gsam_may_follow():
    params, batch, rows, w, _, grads = problem()
    average, alpha = 2 * grads[1], 0.4
    chain = gf.chain(gf.mean_rows(), gf.friendly_sam(0.3), gf.gsam_decompose(alpha))
    state = chain.init(params)
    state["friendly_sam"] = {"average": unflat(average, SHAPES), "count": torch.tensor(1)}
    g = grads.mean(0)
    h = rows_at(w + ascent(w, g - average, 0.3), batch)[1].mean(0)
    expected = h - alpha * (g - (g @ h) / (h @ h) * h)
    assert_close(flat(chain.update(rows, state, params)[0]), expected)


def test_gradients_of_grad_fn():
    params, _, rows, w, _, grads = problem()
    stack = gf.DenseStack(rows.stacked())
    near = []

    def grad_fn(given):
        near.append(given)
        return unflat(grads.flip(0), SHAPES)

    h, _ = run(gf.chain(gf.mean_rows(), gf.friendly_sam(0.3)), stack, params, grad_fn=grad_fn)
    assert_close(flat(h), grads.mean(0))
    g = unflat(grads[0], SHAPES)
    h, out = run(gf.friendly_sam(0.3), g, params, grad_fn=lambda p: near.append(p) or g)
    assert_same(h, g)
    assert out["surrogate_gap"].isnan() and out["clean_grads"] is g
    assert_close(flat(near[0]) - w, ascent(w, grads.mean(0), 0.3), atol=1e-14)
    assert_close(flat(near[1]) - w, ascent(w, grads[0], 0.3), atol=1e-14)


# --- Properties ---


@given(seed=st.integers(0, 2**20), decay=st.floats(0.05, 0.99))
def test_an_average_that_has_taken_in_the_gradient_gives_the_same_direction(seed, decay):
    """With σ = 1 it does not matter whether m takes in g before or after it is subtracted."""
    params, g, m = (normal_tree(seed + i) for i in range(3))
    link, near = gf.friendly_sam(0.5, decay=decay), []
    state = {"average": m, "count": torch.tensor(3)}
    link.update(g, state, params, grad_fn=lambda p: near.append(p) or g)
    after = decay * flat(m) + (1 - decay) * flat(g)
    expected = ascent(flat(params), flat(g) - after, 0.5)
    assert_close(flat(near[0]) - flat(params), expected, rtol=1e-8, atol=1e-12)


@given(seed=st.integers(0, 2**20))
def test_sigma_0_is_sam(seed):
    params, g, m = (normal_tree(seed + i) for i in range(3))
    grad_fn = lambda p: {name: leaf.sin() for name, leaf in p.items()}
    link = gf.friendly_sam(0.5, sigma=0.0)
    h, _, _ = link.update(g, {"average": m, "count": torch.tensor(3)}, params, grad_fn=grad_fn)
    assert_close(h, run(gf.sam_perturb(0.5), g, params, grad_fn=grad_fn)[0])


@given(seed=st.integers(0, 2**20), sigma=st.floats(0, 3))
def test_the_perturbation_has_the_length_of_the_radius(seed, sigma):
    params, g, m = (normal_tree(seed + i) for i in range(3))
    near = []
    state = {"average": m, "count": torch.tensor(1)}
    link = gf.friendly_sam(0.5, sigma=sigma)
    link.update(g, state, params, grad_fn=lambda p: near.append(p) or g)
    assert_close((flat(near[0]) - flat(params)).norm().item(), 0.5, rtol=1e-8)


# --- The memory ---


def test_a_skipped_step_leaves_the_memory_as_it_is():
    params = make_params()
    update = gf.chain(gf.mean_rows(), gf.friendly_sam(0.3), gf.sgd(0.1, momentum=0.9))
    own, state = params, update.init(params)
    expected, plain = params, update.init(params)
    for k in range(6):
        batch, keep = make_batch(10 * k), torch.tensor(k not in (0, 3))
        before = gf.state_dict(state)
        own, state, _ = update(own, state, make_rows(own, batch), keep=keep)
        if keep:
            expected, plain, _ = update(expected, plain, make_rows(expected, batch))
        else:
            assert_same(gf.state_dict(state), before)
        assert_same((own, state), (expected, plain))
    assert state["friendly_sam"]["count"] == 4


def test_a_resumed_run_continues():
    model, given = net(), batches(6)
    step = train_step_of(model, gf.friendly_sam(0.3))
    state = step.init(model)
    for batch in given[:3]:
        state, _ = step(state, batch)
    saved = {name: leaf.clone() for name, leaf in gf.state_dict(state).items()}
    again = gf.load_state_dict(step.init(model), saved)
    for batch in given[3:]:
        state, _ = step(state, batch)
        again, _ = step(again, batch)
        assert_same(again["params"], state["params"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_average_is_float32_or_wider(dtype):
    params = {name: p.to(dtype) for name, p in make_params().items()}
    link = gf.friendly_sam(0.3, decay=0.99)
    state = link.init(params)
    g = {name: torch.ones_like(p) for name, p in params.items()}
    for k in range(3):
        grads = {name: (1 + k / 64) * leaf for name, leaf in g.items()}
        h, state, _ = link.update(grads, state, params, grad_fn=lambda p: g)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(leaf.dtype == wide for leaf in state["average"].values())
    assert all(leaf.dtype == dtype for leaf in h.values())
    expected = 0.99 * (0.99 + 0.01 * (1 + 1 / 64)) + 0.01 * (1 + 2 / 64)
    for leaf in state["average"].values():
        assert_close(leaf.double(), torch.full_like(leaf, expected).double(), rtol=1e-6)


def test_where_nothing_is_new_nothing_is_perturbed():
    params, g = normal_tree(0), normal_tree(1)
    link, near = gf.friendly_sam(0.5), []
    state = link.init(params)
    for _ in range(2):
        h, state, _ = link.update(g, state, params, grad_fn=lambda p: near.append(p) or g)
        assert_same(h, g)
    assert_close((flat(near[0]) - flat(params)).norm().item(), 0.5)
    assert_same(near[1], params)


@every_form
def test_a_zero_gradient_stays_finite(adaptive, rho, eta):
    params = normal_tree(0)
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    link, near = gf.friendly_sam(rho, adaptive=adaptive, eta=eta), []
    h, _ = run(link, zero, params, grad_fn=lambda p: near.append(p) or zero)
    assert_same(h, zero)
    assert_same(near[0], params)


def test_a_row_that_is_not_finite_does_not_reach_the_memory_when_it_is_removed():
    params, batch, rows, w, _, grads = problem(3, bad=(1,))
    good = [0, 2, 3]
    for links in (
        (gf.finite_filter(), gf.mean_rows(), gf.friendly_sam(0.2)),
        (gf.finite_filter(), gf.friendly_sam(0.2), gf.mean_rows()),
    ):
        chain = gf.chain(*links)
        h, state, _ = chain.update(rows, chain.init(params), params)
        near = w + ascent(w, grads[good].mean(0), 0.2)
        assert_close(flat(h), rows_at(near, batch)[1][good].mean(0))
        assert_close(flat(state["friendly_sam"]["average"]), grads[good].mean(0))
    bare = gf.chain(gf.mean_rows(), gf.friendly_sam(0.2))
    h, state, _ = bare.update(rows, bare.init(params), params)
    assert flat(h).isnan().any() and flat(state["friendly_sam"]["average"]).isnan().any()


def test_one_row():
    params, g = make_params(), make_params(1)
    rows = gf.DenseStack({name: leaf[None] for name, leaf in g.items()})
    link = gf.chain(gf.friendly_sam(0.3), gf.mean_rows())
    h, _ = run(link, rows, params, grad_fn=lambda p: {n: 2 * q[None] for n, q in p.items()})
    w = flat(params)
    assert_close(flat(h), 2 * (w + ascent(w, flat(g), 0.3)))


def test_a_compiled_step_follows_the_step():
    model = net()
    step = train_step_of(model, gf.friendly_sam(0.3, adaptive="asam"))
    compiled = gf.compile(step, backend="graph")
    state, own = step.init(model), step.init(model)
    for batch in batches(4):
        state, _ = step(state, batch)
        own, _ = compiled(own, batch)
        assert_close(own["params"], state["params"])
    assert len(compiled.graphs.entries) == 1


@pytest.mark.parametrize("plan", ["loop", "fused"])
def test_rows_of_the_batch_in_parts(plan):
    model = net()
    steps = [
        train_step_of(model, gf.friendly_sam(0.3), plan=plan, rows_at_once=size)
        for size in (None, 2)
    ]
    states = [step.init(model) for step in steps]
    for batch in batches(4):
        states = [step(state, batch)[0] for step, state in zip(steps, states, strict=True)]
        assert_close(states[1]["params"], states[0]["params"])
        assert_close(states[1]["transforms"], states[0]["transforms"])


# --- Errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "friendly_sam: expected 0 <= rho, found rho=-0.1"),
        ({"rho": 0.1, "sigma": -1}, "friendly_sam: expected 0 <= sigma, found sigma=-1"),
        ({"rho": 0.1, "decay": 1}, "friendly_sam: expected 0 <= decay < 1, found decay=1"),
        ({"rho": 0.1, "eta": -1}, "friendly_sam: expected 0 <= eta"),
        ({"rho": 0.1, "adaptive": "sam"}, r"friendly_sam: .* found 'sam'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.friendly_sam(**arguments)


def test_gradients_that_know_no_other_point_are_refused_by_name():
    params, _, rows, *_ = problem()
    with pytest.raises(ValueError, match=r"friendly_sam: expected the weights .* Put friendly_sam"):
        run(gf.friendly_sam(0.1), make_params(1), params)
    with pytest.raises(ValueError, match="friendly_sam: "):
        run(gf.friendly_sam(0.1), gf.DenseStack(rows.stacked()), params)


# --- Another implementation ---


@pytest.mark.slow
@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.3), (True, 0.5)])
def test_steps_are_those_of_pytorch_optimizer(adaptive, rho):
    others = pytest.importorskip("pytorch_optimizer")
    model = net()
    make = lambda params: others.FriendlySAM(
        params, torch.optim.SGD, rho=rho, sigma=0.8, lmbda=0.7, adaptive=adaptive, lr=0.1,
        momentum=0.9,
    )  # fmt: skip
    hand = ByHand(model, make)
    form = "asam" if adaptive else None  # without η, and on the direction without the average
    step = train_step_of(model, gf.friendly_sam(rho, sigma=0.8, decay=0.7, adaptive=form, eta=0.0))
    state = step.init(model)
    for batch in batches(30):
        hand.gradient(batch)
        hand.optimizer.step(lambda batch=batch: hand.gradient(batch))
        state, _ = step(state, batch)
        # Its norms are in float32.
        assert_close(flat(state["params"]), hand.weights, rtol=1e-5, atol=1e-7)
