"""The update rules against `torch.optim` over 100 steps."""

from itertools import product

import pytest
import torch

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, generator

STEPS = 100
SHAPES = {"weight": (4, 3), "bias": (3,), "scale": (), "kernel": (2, 1, 2, 2)}
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def every(**choices):
    """All combinations of some choices, as keyword arguments."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


L2, BOOL = (0.0, 0.05), (False, True)
PLAIN_SGD = every(momentum=(0.0, 0.9), dampening=(0.0, 0.3), weight_decay=L2, maximize=BOOL)
NESTEROV = every(momentum=(0.9,), nesterov=(True,), weight_decay=L2, maximize=BOOL)
# Two settings of the numbers: an eps of the size of many gradients shows where it is added.
ADAM = [
    {"betas": betas, "eps": eps, **flags}
    for betas, eps in (((0.9, 0.999), 1e-8), ((0.0, 0.5), 1e-2))
    for flags in every(weight_decay=L2, amsgrad=BOOL, maximize=BOOL)
]
RMSPROP = [
    {"alpha": alpha, "eps": eps, **flags}
    for alpha, eps in ((0.99, 1e-8), (0.5, 1e-2))
    for flags in every(weight_decay=L2, momentum=(0.0, 0.9), centered=BOOL, maximize=BOOL)
]
DEFAULTS = [("sgd", {}), ("adam", {}), ("adamw", {}), ("rmsprop", {})]
RULES = [
    *DEFAULTS,
    *(("sgd", flags) for flags in PLAIN_SGD + NESTEROV),
    *(("adam", flags) for flags in ADAM),
    *(("adamw", flags) for flags in ADAM),
    *(("rmsprop", flags) for flags in RMSPROP),
]
LIVELY = [
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"amsgrad": True, "weight_decay": 0.05}),
    ("adamw", {"weight_decay": 0.3}),
    ("rmsprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.05}),
]
lively_rules = pytest.mark.parametrize(("name", "flags"), LIVELY)


def named(flags):
    return ",".join(f"{key}={value}" for key, value in flags.items()) or "defaults"


def draws(steps=STEPS, seed=0):
    """Parameters, and gradients for every step, with entries of very different sizes."""
    g = generator(seed)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g)
    params = {name: draw(shape) for name, shape in SHAPES.items()}
    sizes = {name: 10 ** draw(shape) for name, shape in SHAPES.items()}
    grads = [{name: sizes[name] * draw(s) for name, s in SHAPES.items()} for _ in range(steps)]
    return params, grads


def torch_training(name, flags, params, grads, lrs):
    """torch.optim over some steps, each with its own lr."""
    leaves = {leaf: torch.nn.Parameter(p.clone()) for leaf, p in params.items()}
    optimizer = TORCH[name](leaves.values(), lr=lrs[0], **flags)
    for g, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for leaf, p in leaves.items():
            p.grad = g[leaf].clone()
        optimizer.step()
    return {leaf: p.detach() for leaf, p in leaves.items()}


def training(update, params, grads, **extra):
    state = update.init(params)
    for g in grads:
        params, state, _ = update(params, state, g, **extra)
    return params, state


@pytest.mark.parametrize(
    ("name", "flags"), RULES, ids=[f"{name}-{named(flags)}" for name, flags in RULES]
)
def test_a_hundred_steps_are_those_of_torch_optim(name, flags):
    params, grads = draws()
    ours, state = training(getattr(gf, name)(0.01, **flags), params, grads)
    assert_close(ours, torch_training(name, flags, params, grads, [0.01] * STEPS))
    assert state["count"] == STEPS
    assert not any(torch.equal(ours[leaf], p) for leaf, p in params.items())


@pytest.mark.parametrize(
    ("name", "flags"), RULES, ids=[f"{name}-{named(flags)}" for name, flags in RULES]
)
def test_so_are_the_updates_that_a_rule_hands_on(name, flags):
    """Behind a rule that has the last word, nobody sees updates; here ema_params does."""
    params, grads = draws()
    update = gf.chain(getattr(gf, name)(0.01, **flags), gf.ema_params())
    ours, _ = training(update, params, grads)
    assert_close(ours, torch_training(name, flags, params, grads, [0.01] * STEPS))


@lively_rules
def test_donated_steps_are_those_of_torch_optim(name, flags):
    params, grads = draws()
    expected = torch_training(name, flags, params, grads, [0.01] * STEPS)
    ours, _ = training(getattr(gf, name)(0.01, **flags), params, grads, donate=True)
    assert_close(ours, expected)
    assert all(ours[leaf] is p for leaf, p in params.items())


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_the_lr_is_by_default_that_of_torch_optim(name):
    params, grads = draws(3)
    lr = TORCH[name]([torch.zeros(1)]).defaults["lr"]
    ours, _ = training(getattr(gf, name)(), params, grads)
    assert_close(ours, torch_training(name, {}, params, grads, [lr] * 3))


@lively_rules
def test_a_schedule_is_torch_optim_with_the_lr_set_before_every_step(name, flags):
    params, grads = draws()
    schedule = gf.schedules.cosine(0.05, 80, min_value=0.001, warmup_steps=10)
    lrs = [schedule(k).item() for k in range(STEPS)]
    assert len(set(lrs)) > 70
    ours, _ = training(getattr(gf, name)(schedule, **flags), params, grads)
    assert_close(ours, torch_training(name, flags, params, grads, lrs))


@lively_rules
def test_the_lr_in_use_is_published(name, flags):
    schedule = gf.schedules.linear(0.1, 10)
    params, grads = draws(4)
    update = getattr(gf, name)(schedule, **flags)
    state = update.init(params)
    for k, g in enumerate(grads):
        params, state, info = update(params, state, g)
        assert info[f"{name}/lr"] == schedule(k)


@lively_rules
def test_a_skipped_step_never_happened(name, flags):
    params, grads = draws(30)
    skipped = {0, 3, 4, 11, 29}
    schedule = gf.schedules.linear(0.05, 25, min_value=0.001)
    update = getattr(gf, name)(schedule, **flags)
    ours, state = params, update.init(params)
    for k, g in enumerate(grads):
        before = ours, gf.state_dict(state)
        ours, state, _ = update(ours, state, g, keep=torch.tensor(k not in skipped))
        if k in skipped:
            assert_same((ours, gf.state_dict(state)), before)
    taken = [g for k, g in enumerate(grads) if k not in skipped]
    lrs = [schedule(k).item() for k in range(len(taken))]
    assert_close(ours, torch_training(name, flags, params, taken, lrs))
    assert state["count"] == len(taken)


def test_the_first_momentum_buffer_is_undampened():
    update = gf.sgd(1.0, momentum=0.9, dampening=0.5)
    params = {"w": torch.zeros((), dtype=torch.float64)}
    state, seen = update.init(params), []
    for _ in range(3):
        params, state, _ = update(params, state, {"w": torch.ones((), dtype=torch.float64)})
        seen.append(params["w"].item())
    assert seen == pytest.approx([-1, -2.4, -4.16])


def test_the_lr_is_in_no_buffer():
    params, grads = draws(5)
    small, large = (
        training(gf.sgd(lr, momentum=0.9, dampening=0.1), params, grads)[1]["momentum"]
        for lr in (1e-3, 10.0)
    )
    assert_same(small, large)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.sgd(-0.1), r"sgd: expected 0 <= lr, found lr=-0.1.*Schedule"),
        (lambda: gf.sgd(float("nan")), "found lr=nan"),
        (lambda: gf.sgd("0.1"), "found lr='0.1'"),
        (lambda: gf.sgd(lambda k: 0.1), "sgd: expected 0 <= lr, found lr=<function"),
        (lambda: gf.sgd(0.1, momentum=-1), "0 <= momentum, found momentum=-1"),
        (lambda: gf.sgd(0.1, weight_decay=-1), "0 <= weight_decay, found weight_decay=-1"),
        (lambda: gf.sgd(0.1, nesterov=True), "momentum > 0 and dampening = 0 with nesterov"),
        (
            lambda: gf.sgd(0.1, momentum=0.9, dampening=0.1, nesterov=True),
            "found momentum=0.9, dampening=0.1",
        ),
        (lambda: gf.adam(-1.0), "adam: expected 0 <= lr"),
        (lambda: gf.adam(betas=(-0.1, 0.9)), "adam: expected 0 <= beta.*found beta=-0.1"),
        (lambda: gf.adam(betas=(1.0, 0.9)), "adam: expected 0 <= beta.*found beta=1.0"),
        (lambda: gf.adamw(betas=(0.9, 1.0)), "adamw: expected 0 <= beta.*found beta=1.0"),
        (lambda: gf.adam(eps=-1), "0 <= eps"),
        (lambda: gf.adam(weight_decay=-1), "adam: expected 0 <= weight_decay"),
        (lambda: gf.adamw(weight_decay=-1), "adamw: expected 0 <= weight_decay"),
        (lambda: gf.rmsprop(alpha=1.5), "0 <= alpha <= 1, found alpha=1.5"),
        (lambda: gf.rmsprop(eps=-1), "rmsprop: expected 0 <= eps"),
        (lambda: gf.rmsprop(momentum=-1), "rmsprop: expected 0 <= momentum"),
        (lambda: gf.rmsprop(weight_decay=-1), "rmsprop: expected 0 <= weight_decay"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Decay of some leaves, as torch has it by groups ---


def is_matrix(name):
    return name in ("weight", "kernel")


def torch_groups(name, flags, params, grads, skip=()):
    """torch.optim with a group without weight decay for the leaves that are no matrices."""
    own = {leaf: torch.nn.Parameter(p.clone()) for leaf, p in params.items()}
    rest = [p for leaf, p in own.items() if not is_matrix(leaf)]
    groups = [
        {"params": [p for leaf, p in own.items() if is_matrix(leaf)]},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = TORCH[name](groups, lr=0.01, **flags)
    for k, g in enumerate(grads):
        for leaf, p in own.items():
            p.grad = g[leaf].clone()
        if k not in skip:
            optimizer.step()
    return {leaf: p.detach() for leaf, p in own.items()}


DECAYS = [
    ("sgd", {"momentum": 0.9, "weight_decay": 0.05}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("adam", {"amsgrad": True, "weight_decay": 0.05}),
    ("adamw", {"weight_decay": 0.3}),
    ("rmsprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.05}),
]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("name", "flags"), DECAYS, ids=str)
def test_decay_of_some_leaves_is_that_of_groups(name, flags, donate):
    params, grads = draws()
    expected = torch_groups(name, flags, params, grads)
    everywhere = torch_training(name, flags, params, grads, [0.01] * STEPS)
    assert (everywhere["bias"] - expected["bias"]).abs().max() > 1e-3
    update = getattr(gf, name)(0.01, decays=is_matrix, **flags)
    behind = gf.chain(getattr(gf, name)(0.01, decays=is_matrix, **flags), gf.ema_params())
    scaled = gf.chain(gf.clip_by_global_norm(1e9), update)  # the rule multiplies the products
    for rule in (update, behind, scaled):
        copies = {leaf: p.clone() for leaf, p in params.items()}
        ours, _ = training(rule, copies, grads, donate=donate)
        assert_close(ours, expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_decay_of_some_leaves_equals_the_fused_optimizer_bit_for_bit(name):
    params, grads = draws()
    params = {leaf: p.float() for leaf, p in params.items()}
    grads = [{leaf: g.float() for leaf, g in tree.items()} for tree in grads]
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    flags = {"weight_decay": 0.05, **momentum}
    update = getattr(gf, name)(0.01, decays=is_matrix, **flags)
    state, ours = update.init(params), params
    for k, g in enumerate(grads):
        ours, state, _ = update(ours, state, g, keep=torch.tensor(k % 5 != 2))
    skip = range(2, STEPS, 5)
    expected = torch_groups(name, {**flags, "fused": True}, params, grads, skip)
    assert_same(ours, expected)


@pytest.mark.parametrize("name", TORCH)
def test_decay_is_refused_where_it_has_no_effect(name):
    make = getattr(gf, name)
    with pytest.raises(ValueError, match="expected weight_decay > 0"):
        make(0.1, weight_decay=0, decays=is_matrix)
    with pytest.raises(TypeError, match="decays as a function"):
        make(0.1, weight_decay=0.1, decays=["bias"])
    with pytest.raises(ValueError, match="expected decays to choose a leaf"):
        make(0.1, weight_decay=0.1, decays=is_matrix).init({"bias": torch.ones(1)})


def test_a_scheduled_decay_keeps_to_its_leaves():
    params, grads = draws(5)
    constant = gs.constant(0.05)
    driven = gf.scheduled(gf.sgd, lr=0.01, weight_decay=constant, decays=is_matrix)
    ours, _ = training(driven, params, grads)
    assert_close(ours, torch_groups("sgd", {"weight_decay": 0.05}, params, grads))
