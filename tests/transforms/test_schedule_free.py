"""Schedule-free training against the algorithm of its paper and the package of its authors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, generator, normal, normal_tree

STEPS = 100
WARMUP = gs.constant(0.1, warmup_steps=20, init_value=0.005)


def draw_noise(steps=STEPS):
    return [normal_tree(k + 100) for k in range(steps)]


def gradient(point, noise):
    """Of a quadratic with curvatures from 0.05 to 2, and noise."""
    curves = {
        n: torch.linspace(0.05, 2, p.numel()).double().view(p.shape) for n, p in point.items()
    }
    return {n: curves[n] * (p - 1) + 0.3 * noise[n] for n, p in point.items()}


def naive(params, lrs, noise, change, *, beta=0.9, r=0.0, power=2.0):
    """The paper's algorithm: three sequences x, y, z, and the weights from the largest lr."""
    x = {n: p.clone() for n, p in params.items()}
    y = {n: p.clone() for n, p in params.items()}
    z = {n: p.clone() for n, p in params.items()}
    memory, largest, total = {}, 0.0, 0.0
    for k, lr in enumerate(lrs, 1):
        g = gradient(y, noise[k - 1])
        for n in z:
            z[n] = z[n] + change(n, g[n], y[n], lr, k, memory)
        largest = max(largest, lr)
        weight = k**r * largest**power
        total += weight
        c = weight / total if total > 0 else 0.0
        for n in x:
            x[n] = (1 - c) * x[n] + c * z[n]
            y[n] = beta * x[n] + (1 - beta) * z[n]
    return x, y


def sgd_change(decay):
    return lambda n, g, y, lr, k, memory: -lr * (g + decay * y)


def adamw_change(decay, beta2=0.99, eps=1e-8):
    def change(n, g, y, lr, k, memory):
        v = memory[n] = beta2 * memory.get(n, 0.0) + (1 - beta2) * g * g
        return -lr * g / ((v / (1 - beta2**k)).sqrt() + eps) - lr * decay * y

    return change


def trained(update, params, noise, **extra):
    state, infos = update.init(params), []
    for one in noise:
        params, state, info = update(params, state, gradient(params, one), **extra)
        infos.append(info)
    return params, state, infos


RULES = {
    "sgd": (lambda lr: gf.sgd(lr, weight_decay=0.1), sgd_change(0.1)),
    "adamw": (
        lambda lr: gf.adamw(lr, betas=(0.0, 0.99), weight_decay=0.1),
        adamw_change(0.1),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"beta": 0.98, "r": 1.0},
        {"beta": 0.0},
        {"beta": 1.0},
        {"weight_lr_power": 0.0},
        {"weight_lr_power": 1.0, "r": 0.5},
    ],
    ids=str,
)
def test_a_hundred_steps_are_those_of_the_paper(rule, numbers):
    make, change = RULES[rule]
    params, noise = normal_tree(0), draw_noise()
    after, state, infos = trained(gf.schedule_free(make(WARMUP), **numbers), params, noise)
    lrs = [WARMUP(k).item() for k in range(STEPS)]
    assert len(set(lrs)) == 21
    given = {key.removeprefix("weight_lr_"): value for key, value in numbers.items()}
    x, y = naive(params, lrs, noise, change, **given)
    assert_close(after, y, rtol=1e-9, atol=1e-12)
    assert_close(gf.evaluated_params(after, state), x, rtol=1e-9, atol=1e-12)
    assert infos[0]["schedule_free/share"] == 1
    assert infos[5]["schedule_free/lr"] == WARMUP(5)


def test_the_weights_are_those_of_the_largest_rate_so_far():
    params, noise = normal_tree(0), draw_noise(40)
    lr = gs.cosine(0.1, 30, min_value=0.001, warmup_steps=5)  # it falls after five steps
    after, state, _ = trained(gf.schedule_free(gf.sgd(lr)), params, noise)
    x, y = naive(params, [lr(k).item() for k in range(40)], noise, sgd_change(0.0))
    assert_close(after, y)
    assert_close(gf.evaluated_params(after, state), x)


def test_steps_with_a_learning_rate_of_zero_have_no_weight():
    params, noise = normal_tree(0), draw_noise(12)
    lr = gs.constant(0.1, warmup_steps=4)  # the first lr is 0
    after, state, infos = trained(gf.schedule_free(gf.sgd(lr)), params, noise)
    x, y = naive(params, [lr(k).item() for k in range(12)], noise, sgd_change(0.0))
    assert [info["schedule_free/share"].item() for info in infos[:2]] == [0, 1]
    assert_close(after, y)
    assert_close(gf.evaluated_params(after, state), x)


def test_with_a_constant_rate_the_average_is_the_plain_mean_of_the_newest():
    params, noise = normal_tree(0), draw_noise(10)
    newest, state, points = params, gf.sgd(0.1).init(params), []
    for one in noise:  # beta = 0: the gradients of plain SGD
        newest, state, _ = gf.sgd(0.1)(newest, state, gradient(newest, one))
        points.append(newest)
    after, state, _ = trained(gf.schedule_free(gf.sgd(0.1), beta=0.0), params, noise)
    mean = {n: torch.stack([point[n] for point in points]).mean(0) for n in params}
    assert_close(after, newest)
    assert_close(gf.evaluated_params(after, state), mean)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_module_are_taken_at_y(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = normal(8, 4), torch.arange(8) % 3
    make, change = RULES[rule]
    update = gf.chain(gf.mean_rows(), gf.schedule_free(make(0.05)))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=2)
    state = step.init(model)
    z = {n: p.detach().clone() for n, p in model.named_parameters()}
    average, memory = dict(z), {}
    for k in range(1, 7):
        state, _ = step(state, (x, y))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                z[n] = z[n] + change(n, p.grad, p, 0.05, k, memory)
                average[n] = (1 - 1 / k) * average[n] + z[n] / k
                p.copy_(0.9 * average[n] + 0.1 * z[n])
    assert_close(state["params"], {n: p.detach() for n, p in model.named_parameters()})
    assert_close(gf.evaluated_params(state["params"], state), average)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_hundred_steps_are_those_of_the_authors_package(rule):
    package = pytest.importorskip("schedulefree")
    steps, params, noise = 20, normal_tree(0), draw_noise()
    leaves = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    if rule == "sgd":
        theirs = package.SGDScheduleFree(
            leaves.values(), lr=0.1, momentum=0.9, weight_decay=0.05, warmup_steps=steps, r=0.5
        )
        own = lambda lr: gf.sgd(lr, weight_decay=0.05)
    else:
        theirs = package.AdamWScheduleFree(
            *(leaves.values(), 0.1), betas=(0.9, 0.99), weight_decay=0.05, warmup_steps=steps, r=0.5
        )
        own = lambda lr: gf.adamw(lr, betas=(0.0, 0.99), weight_decay=0.05)
    theirs.train()
    for one in noise:
        point = {n: p.detach() for n, p in leaves.items()}
        for n, g in gradient(point, one).items():
            leaves[n].grad = g.clone()
        theirs.step()
    # Their warm-up is lr (k + 1) / steps.
    lr = gs.constant(0.1, warmup_steps=steps - 1, init_value=0.1 / steps)
    after, state, _ = trained(gf.schedule_free(own(lr), r=0.5), params, noise)
    assert_close(after, {n: p.detach() for n, p in leaves.items()}, rtol=1e-8, atol=1e-10)
    theirs.eval()
    expected = {n: p.detach() for n, p in leaves.items()}
    assert_close(gf.evaluated_params(after, state), expected, rtol=1e-8, atol=1e-10)


def test_a_skipped_step_never_happened():
    params, noise = normal_tree(0), draw_noise(12)
    update = gf.schedule_free(gf.adamw(WARMUP, betas=(0.0, 0.99)))
    taken = [one for k, one in enumerate(noise) if k % 4 != 3]
    expected = trained(update, params, taken)[:2]
    state = update.init(params)
    for k, one in enumerate(noise):
        before = params, gf.state_dict(state)
        keep = torch.tensor(k % 4 != 3)
        params, state, _ = update(params, state, gradient(params, one), keep=keep)
        if not keep:
            assert_same((params, gf.state_dict(state)), before)
    assert_same((params, gf.state_dict(state)), (expected[0], gf.state_dict(expected[1])))


def test_other_rules_without_momentum():
    params, noise = normal_tree(0), draw_noise(40)
    start = sum((p - 1).square().sum() for p in params.values())
    for rule in (gf.adam(0.05, betas=(0.0, 0.99)), gf.rmsprop(0.05), gf.lion(0.05, betas=(0, 0))):
        after, state, _ = trained(gf.schedule_free(rule), params, noise)
        found = gf.evaluated_params(after, state)
        assert sum((p - 1).square().sum() for p in found.values()) < start / 2
    matrices = {"w": normal(3, 4)}
    update = gf.schedule_free(gf.muon(0.1, momentum=0.0))
    assert update(matrices, update.init(matrices), {"w": normal(3, 4, seed=1)})[2]
    with pytest.raises(ValueError, match="muon: expected leaves with two dims"):
        update.init(normal_tree(0))


def test_half_precision_keeps_the_offset_in_single_precision():
    params = {n: p.bfloat16() for n, p in normal_tree(0).items()}
    after, state, _ = trained(gf.schedule_free(gf.sgd(0.1)), params, [params, params])
    assert all(leaf.dtype == torch.float32 for leaf in state["offset"].values())
    found = gf.evaluated_params(after, state)
    assert all(leaf.dtype == torch.bfloat16 for leaf in (*found.values(), *after.values()))


def test_a_row_of_nan_shows_or_is_removed_before():
    params = {"w": torch.zeros(2)}
    rows = {"w": torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])}
    plain = gf.chain(gf.mean_rows(), gf.schedule_free(gf.sgd(0.1)))
    after, state, _ = plain(params, plain.init(params), rows)
    assert after["w"][0].isnan() and gf.evaluated_params(after, state)["w"][0].isnan()
    guarded = gf.chain(gf.finite_filter(), plain)
    after, state, _ = guarded(params, guarded.init(params), rows)
    assert_close(after["w"], torch.tensor([-0.1, -0.1]))


def test_scheduled_numbers_and_a_function_of_ones_own():
    params, noise = normal_tree(0), draw_noise(10)
    beta, decay = gs.linear(0.95, 6, min_value=0.5), gs.linear(0.3, 5)

    def factory(beta, weight_decay):
        return gf.schedule_free(gf.sgd(0.1, weight_decay=weight_decay), beta=beta)

    update = gf.scheduled(factory, beta=beta, weight_decay=decay)
    state, hand, hand_state = update.init(params), params, None
    for k, one in enumerate(noise):
        by_hand = factory(beta(k).item(), decay(k).item())
        hand_state = by_hand.init(params) if hand_state is None else hand_state
        hand, hand_state, _ = by_hand(hand, hand_state, gradient(hand, one))
        params, state, info = update(params, state, gradient(params, one))
        assert_close(params, hand)
        assert info["schedule_free/beta"] == beta(k)
        found = gf.evaluated_params(params, state)
        assert_close(found, gf.evaluated_params(hand, hand_state))


def test_the_average_follows_parameters_that_another_rule_moves_first():
    params, noise = normal_tree(0), draw_noise(6)
    plain, averaged = gf.sgd(0.1), gf.schedule_free(gf.sgd(0.1))
    update = gf.late(averaged, 3, plain)
    moved, state = params, update.init(params)
    for one in noise[:3]:
        moved, state, _ = update(moved, state, gradient(moved, one))
    assert_same(gf.evaluated_params(moved, state), moved)
    expected, own, _ = trained(averaged, moved, noise[3:])
    for one in noise[3:]:
        moved, state, _ = update(moved, state, gradient(moved, one))
    assert_close(moved, expected)
    assert_close(gf.evaluated_params(moved, state), gf.evaluated_params(expected, own))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gf.schedule_free(gf.sgd(0.1), beta=1.1), ValueError, "0 <= beta <= 1"),
        (lambda: gf.schedule_free(gf.sgd(0.1), beta=math.nan), ValueError, "found beta=nan"),
        (lambda: gf.schedule_free(gf.sgd(0.1), r=-1), ValueError, "0 <= r"),
        (lambda: gf.schedule_free(gf.sgd(0.1), weight_lr_power=-1), ValueError, "weight_lr_power"),
        (lambda: gf.schedule_free(gf.sgd(0.1, momentum=0.9)), ValueError, "without momentum.*sgd"),
        (lambda: gf.schedule_free(gf.adamw()), ValueError, r"betas=\(0, 0.999\)"),
        (lambda: gf.schedule_free(gf.lion()), ValueError, "without momentum, found lion"),
        (lambda: gf.schedule_free(gf.muon()), ValueError, "without momentum, found muon"),
        (lambda: gf.schedule_free(gf.rmsprop(momentum=0.5)), ValueError, "without momentum"),
        (lambda: gf.schedule_free(gf.sgd), TypeError, "one update rule of this package.*function"),
        (lambda: gf.schedule_free(gf.agc_clip()), TypeError, "found agc_clip"),
        (lambda: gf.schedule_free(gf.freeze()), TypeError, "found freeze"),
        (lambda: gf.schedule_free(gf.chain(gf.agc_clip(), gf.sgd(0.1))), TypeError, "rule alone"),
        (lambda: gf.schedule_free(gf.gate(gf.sgd(0.1), "on")), TypeError, "found gate"),
        (
            lambda: gf.schedule_free(gf.scheduled(gf.sgd, lr=0.1, weight_decay=gs.linear(1.0, 3))),
            TypeError,
            r"scheduled\(f, ...\) with a function f that returns schedule_free",
        ),
        (lambda: gf.schedule_free(gf.schedule_free(gf.sgd(0.1))), TypeError, "found schedule_free"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("follower", [gf.ema_params(0.9), gf.freeze(lambda name: name == "a")])
def test_transforms_of_updates_behind_it_are_refused(follower):
    update = gf.chain(gf.mean_rows(), gf.schedule_free(gf.sgd(0.1)), follower)
    with pytest.raises(ValueError, match=f"schedule_free: .* behind it, found '{follower.name}'"):
        update.init({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_random_gradients_keep_x_y_and_z_on_a_line():
    """y = beta x + (1 - beta) z, with z from the rule alone."""
    g, params = generator(3), {"w": torch.zeros(5, dtype=torch.float64)}
    update, z = gf.schedule_free(gf.sgd(0.3), beta=0.7), params["w"]
    state = update.init(params)
    for _ in range(20):
        grads = {"w": torch.randn(5, dtype=torch.float64, generator=g)}
        params, state, _ = update(params, state, grads)
        z = z - 0.3 * grads["w"]
        x = gf.evaluated_params(params, state)["w"]
        assert_close(params["w"], 0.7 * x + 0.3 * z)
        assert_close(state["offset"]["w"], z - x)
