"""Momentum-SAM against the algorithm of its paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, normal, normal_tree

STEPS = 100


def draw_noise(steps=STEPS):
    return [normal_tree(k + 100) for k in range(steps)]


def gradient(point, noise):
    curves = {
        n: torch.linspace(0.05, 2, p.numel()).double().view(p.shape) for n, p in point.items()
    }
    return {n: curves[n] * (p - 1) + 0.3 * noise[n] for n, p in point.items()}


def ahead(w, v, rho):
    norm = sum(leaf.square().sum() for leaf in v.values()).sqrt()
    return {n: w[n] - rho * v[n] / (norm + 1e-12) for n in w}


def naive_sgd(params, lrs, noise, rho, momentum=0.9, decay=0.0, nesterov=False):
    """The paper's algorithm; the decay is at w."""
    w = {n: p.clone() for n, p in params.items()}
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    for lr, one in zip(lrs, noise, strict=True):
        g = gradient(ahead(w, v, rho), one)
        for n in w:
            own = g[n] + decay * w[n]
            v[n] = momentum * v[n] + own
            w[n] = w[n] - lr * (own + momentum * v[n] if nesterov else v[n])
    return w, ahead(w, v, rho)


def naive_adamw(params, lrs, noise, rho, betas=(0.8, 0.99), decay=0.1, eps=1e-8):
    w = {n: p.clone() for n, p in params.items()}
    m = {n: torch.zeros_like(p) for n, p in params.items()}
    s = {n: torch.zeros_like(p) for n, p in params.items()}
    for k, (lr, one) in enumerate(zip(lrs, noise, strict=True), 1):
        g = gradient(ahead(w, m, rho), one)
        for n in w:
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
            s[n] = betas[1] * s[n] + (1 - betas[1]) * g[n].square()
            root = (s[n] / (1 - betas[1] ** k)).sqrt() + eps
            w[n] = (1 - lr * decay) * w[n] - lr * m[n] / (1 - betas[0] ** k) / root
    return w, ahead(w, m, rho)


def trained(update, params, noise, **extra):
    state = update.init(params)
    for one in noise:
        params, state, _ = update(params, state, gradient(params, one), **extra)
    return params, state


LR = gs.cosine(0.1, 80, min_value=0.001, warmup_steps=10)
LRS = [LR(k).item() for k in range(STEPS)]


@pytest.mark.parametrize("rho", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("flags", [{}, {"weight_decay": 0.1}, {"nesterov": True}], ids=str)
def test_a_hundred_steps_of_sgd_are_those_of_the_paper(flags, rho):
    params, noise = normal_tree(0), draw_noise()
    after, state = trained(gf.msam(gf.sgd(LR, momentum=0.9, **flags), rho), params, noise)
    own = {"decay" if key == "weight_decay" else key: value for key, value in flags.items()}
    w, near = naive_sgd(params, LRS, noise, rho, **own)
    assert_close(after, near, rtol=1e-9, atol=1e-12)
    assert_close(gf.evaluated_params(after, state), w, rtol=1e-9, atol=1e-12)
    if not rho:
        plain, _ = trained(gf.sgd(LR, momentum=0.9, **flags), params, noise)
        assert_close(after, plain, rtol=1e-12, atol=1e-12)


def test_a_hundred_steps_of_adamw_perturb_along_the_mean():
    params, noise = normal_tree(0), draw_noise()
    update = gf.msam(gf.adamw(LR, betas=(0.8, 0.99), weight_decay=0.1), 0.7)
    after, state = trained(update, params, noise)
    w, near = naive_adamw(params, LRS, noise, 0.7)
    assert_close(after, near, rtol=1e-9, atol=1e-12)
    assert_close(gf.evaluated_params(after, state), w, rtol=1e-9, atol=1e-12)


# --- The authors' code, step by step: they store the parameters w + e ---


class StoredAhead:
    """What the optimizers of the authors' repository hold: p = w + e, the momentum, and ρ/‖v‖."""

    def __init__(self, params, rho):
        self.p, self.rho, self.reach = {n: p.clone() for n, p in params.items()}, rho, 0.0
        self.v = {n: torch.zeros_like(p) for n, p in params.items()}

    def go_back(self):
        """Remove the perturbation of the last step."""
        self.p = {n: p + self.reach * self.v[n] for n, p in self.p.items()}

    def go_ahead(self):
        """Perturb along the new momentum, by one norm over all tensors."""
        norms = torch.stack([leaf.norm() for leaf in self.v.values()])
        self.reach = self.rho / (norms.norm() + 1e-12)
        self.p = {n: p - self.reach * self.v[n] for n, p in self.p.items()}


def authors_sgd(params, noise, rho, lr=0.1, momentum=0.9, decay=0.0):
    """Their L2 decay is of the stored parameters; their argument ``nesterov`` has no effect."""
    held = StoredAhead(params, rho)
    for one in noise:
        g = gradient(held.p, one)
        g = {n: g[n] + decay * held.p[n] for n in g}
        held.go_back()
        held.v = {n: momentum * held.v[n] + g[n] for n in g}
        held.p = {n: p - lr * held.v[n] for n, p in held.p.items()}
        held.go_ahead()
    return held


def authors_adamw(params, noise, rho, lr=0.1, betas=(0.9, 0.99), decay=0.0, eps=1e-8):
    """Their decay comes after the step, and shortens the step as well."""
    held = StoredAhead(params, rho)
    squares = {n: torch.zeros_like(p) for n, p in params.items()}
    for k, one in enumerate(noise, 1):
        g = gradient(held.p, one)
        held.go_back()
        for n in g:
            held.v[n] = betas[0] * held.v[n] + (1 - betas[0]) * g[n]
            squares[n] = betas[1] * squares[n] + (1 - betas[1]) * g[n] * g[n]
            root = squares[n].sqrt() / (1 - betas[1] ** k) ** 0.5 + eps
            held.p[n] = held.p[n] - lr / (1 - betas[0] ** k) * held.v[n] / root
            held.p[n] = held.p[n] * (1 - lr * decay)
        held.go_ahead()
    return held


def decay_ahead(decay):
    """L2 decay at the parameters that the chain gets, which are w + e."""

    def update(grads, state, params, /, **extra):
        return {n: g + decay * params[n] for n, g in grads.items()}, state, {}

    return gf.transform("decay_ahead", "tree -> tree", update)


def largest_gap(update, held, params, noise):
    after, _ = trained(update, params, noise)
    return max((after[n] - p).abs().max() for n, p in held.p.items())


def same_as_held(update, held, params, noise):
    after, state = trained(update, params, noise)
    assert_close(after, held.p, rtol=1e-10, atol=1e-12)
    held.go_back()  # as before they evaluate
    assert_close(gf.evaluated_params(after, state), held.p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.3, 3.0])
def test_twenty_steps_are_those_of_the_authors_sgd(rho):
    params, noise = normal_tree(0), draw_noise(20)
    rule = gf.msam(gf.sgd(0.1, momentum=0.9), rho)
    same_as_held(rule, authors_sgd(params, noise, rho), params, noise)
    held = authors_sgd(params, noise, rho, decay=0.2)
    same_as_held(gf.chain(decay_ahead(0.2), rule), held, params, noise)
    held = authors_sgd(params, noise, rho, decay=0.2)
    inside = gf.msam(gf.sgd(0.1, momentum=0.9, weight_decay=0.2), rho)
    # The documented difference.
    assert (largest_gap(inside, held, params, noise) > 1e-3) == (rho > 0)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_twenty_steps_are_those_of_the_authors_adamw(rho):
    params, noise = normal_tree(0), draw_noise(20)
    make = lambda lr, decay: gf.msam(gf.adamw(lr, betas=(0.9, 0.99), weight_decay=decay), rho)
    same_as_held(make(0.1, 0.0), authors_adamw(params, noise, rho), params, noise)
    # (1 − ηλ)(w − η d) is the step of a rate η (1 − ηλ) with the decay λ / (1 − ηλ).
    held, kept = authors_adamw(params, noise, rho, decay=0.2), 1 - 0.1 * 0.2
    # The documented difference.
    assert largest_gap(make(0.1, 0.2), held, params, noise) > 1e-3
    same_as_held(make(0.1 * kept, 0.2 / kept), held, params, noise)


def test_gradients_of_a_module_are_taken_ahead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = normal(8, 4), torch.arange(8) % 3
    update = gf.chain(gf.mean_rows(), gf.msam(gf.sgd(0.1, momentum=0.9), 0.3))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=2)
    state = step.init(model)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    for _ in range(6):
        state, info = step(state, (x, y))
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert_close(info["loss"], loss.detach())  # at the point ahead
        with torch.no_grad():
            for n, p in model.named_parameters():
                v[n] = 0.9 * v[n] + p.grad
                w[n] = w[n] - 0.1 * v[n]
            for n, near in ahead(w, v, 0.3).items():
                model.get_parameter(n).copy_(near)
    assert_close(state["params"], {n: p.detach() for n, p in model.named_parameters()})
    assert_close(gf.evaluated_params(state["params"], state), w)


@pytest.mark.parametrize(
    "rule",
    [gf.lion(0.01), gf.rmsprop(0.01, momentum=0.9), gf.adam(0.01, amsgrad=True)],
    ids=lambda rule: rule.name,
)
def test_the_parameters_are_at_the_distance_rho_from_those_to_evaluate(rule):
    params, noise = normal_tree(0), draw_noise(5)
    after, state = trained(gf.msam(rule, 0.25), params, noise)
    found = gf.evaluated_params(after, state)
    distance = sum((after[n] - found[n]).square().sum() for n in found).sqrt()
    assert_close(distance, torch.tensor(0.25, dtype=torch.float64))
    momentum = state["rule"].get("momentum", state["rule"].get("m"))
    assert all(((after[n] - found[n]) * momentum[n] <= 0).all() for n in found)  # downhill


def test_a_skipped_step_never_happened():
    params, noise = normal_tree(0), draw_noise(12)
    update = gf.msam(gf.adamw(LR), 0.5)
    taken = [one for k, one in enumerate(noise) if k % 4 != 3]
    expected = trained(update, params, taken)
    state = update.init(params)
    for k, one in enumerate(noise):
        before = params, gf.state_dict(state)
        keep = torch.tensor(k % 4 != 3)
        params, state, _ = update(params, state, gradient(params, one), keep=keep)
        if not keep:
            assert_same((params, gf.state_dict(state)), before)
    assert_same((params, gf.state_dict(state)), (expected[0], gf.state_dict(expected[1])))


def test_zero_gradients_stay_finite_and_nan_shows():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    update = gf.msam(gf.sgd(0.1, momentum=0.9), 0.5)
    zeros = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    after, state, _ = update(params, update.init(params), zeros)
    assert_same(after, params)
    bad = {"w": torch.tensor([torch.nan, 1.0], dtype=torch.bfloat16)}
    assert update(after, state, bad)[0]["w"][0].isnan()
    guarded = gf.chain(gf.finite_filter(), update)
    assert_same(guarded(params, guarded.init(params), bad)[0], params)


def test_a_scheduled_radius_is_the_factory_called_by_hand():
    params, noise = normal_tree(0), draw_noise(8)
    rule, rho = gf.sgd(0.1, momentum=0.9), gs.proportional(LR, 0.1, 0.5)
    update = gf.scheduled(gf.msam, rule=rule, rho=rho)
    state, hand, hand_state = update.init(params), params, gf.msam(rule, 0.1).init(params)
    for k, one in enumerate(noise):
        by_hand = gf.msam(rule, rho(k).item())
        hand, hand_state, _ = by_hand(hand, hand_state, gradient(hand, one))
        params, state, info = update(params, state, gradient(params, one))
        assert_close(params, hand)
        assert info["msam/rho"] == rho(k)
        assert_close(gf.evaluated_params(params, state), gf.evaluated_params(hand, hand_state))


def test_sharded_parameters_have_the_norm_of_the_whole(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        update = gf.msam(gf.sgd(0.1, momentum=0.9), 0.5)
        params, grads = {"w": normal(4, 3)}, {"w": normal(4, 3, seed=1)}
        spread = lambda tree: {"w": distribute_tensor(tree["w"], mesh, [Shard(0)])}
        expected, found = params, spread(params)
        state, own = update.init(expected), update.init(found)
        for _ in range(3):
            expected, state, _ = update(expected, state, grads)
            found, own, _ = update(found, own, spread(grads))
        assert_close(found["w"].full_tensor(), expected["w"])
        assert_close(
            gf.evaluated_params(found, own)["w"].full_tensor(),
            gf.evaluated_params(expected, state)["w"],
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gf.msam(gf.sgd(0.1, momentum=0.9), -1), ValueError, "msam: expected 0 <= rho"),
        (lambda: gf.msam(gf.sgd(0.1), 0.3), ValueError, r"with momentum, found sgd\(lr=0.1\)"),
        (lambda: gf.msam(gf.rmsprop(), 0.3), ValueError, "with momentum, found rmsprop"),
        (lambda: gf.msam(gf.muon(momentum=0), 0.3), ValueError, "with momentum, found muon"),
        (
            lambda: gf.msam(0.3, gf.sgd(0.1, momentum=0.9)),
            (TypeError, ValueError),
            "msam: expected",
        ),
        (lambda: gf.msam(gf.chain(gf.sgd(0.1, momentum=0.9)), 0.3), TypeError, "wrap the rule"),
        (lambda: gf.msam(gf.schedule_free(gf.sgd(0.1)), 0.3), TypeError, "found schedule_free"),
        (lambda: gf.msam(gf.mean_rows(), 0.3), TypeError, "found mean_rows"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_transforms_of_updates_behind_it_are_refused():
    update = gf.chain(gf.msam(gf.sgd(0.1, momentum=0.9), 0.3), gf.ema_params())
    with pytest.raises(ValueError, match=r"msam: .* behind it, found 'ema_params'"):
        update.init(normal_tree(0))
