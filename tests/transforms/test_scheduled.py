"""Schedules in update rules, and in any transform by `scheduled`."""

import functools
import inspect

import pytest
import torch

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import (
    assert_close,
    assert_same,
    normal_tree,
    random_matrix,
    run,
    unflat,
)
from _regression import make_batch, make_params, make_rows, problem

STEPS = 8
rows = lambda k: gf.DenseStack(unflat(random_matrix(k, 5)))
tree = lambda k: normal_tree(k)

# Link -> what is scheduled, what is fixed, and what kind of gradients it takes. The schedules
# start at 2 (from which on a filter accepts everything) and end at the edge of what is allowed.
STATELESS = {
    "agree_filter": (gf.agree_filter, {"threshold": gs.linear(2.0, 6)}, {}, rows),
    "agree_filter halving": (
        gf.agree_filter,
        {"threshold": gs.cosine(2.0, 6, min_value=0.7)},
        {"average": "halving", "against": "first"},
        rows,
    ),
    "consensus_filter": (
        gf.consensus_filter,
        {"threshold": gs.linear(1.5, 6, min_value=0.5)},
        {},
        rows,
    ),
    "consensus_filter hard": (
        gf.consensus_filter,
        {"threshold": gs.linear(2.0, 6)},
        {"soft": False},
        rows,
    ),
    "sign_agreement": (gf.sign_agreement, {"fraction": gs.linear(1.0, 5)}, {}, rows),
    "trimmed_mean": (gf.trimmed_mean, {"k": gs.step(4, 3, 0.5)}, {}, rows),
    "geometric_median": (gf.geometric_median, {"eps": gs.linear(2.0, 6, min_value=0.1)}, {}, rows),
    "clip_per_row": (gf.clip_per_row, {"max_norm": gs.linear(5, 6, min_value=0.1)}, {}, rows),
    "clip_by_global_norm": (
        gf.clip_by_global_norm,
        {"max_norm": gs.linear(5, 6, min_value=0.1)},
        {},
        tree,
    ),
    "agc_clip": (gf.agc_clip, {"clipping": gs.linear(1.0, 9, min_value=0.01)}, {}, tree),
    "agc_clip until it is off": (gf.agc_clip, {"clipping": gs.linear(1.0, 5)}, {}, tree),
    "agc_clip eps": (
        gf.agc_clip,
        {"eps": gs.step(10.0, 2), "clipping": gs.poly(0.3, -0.5)},
        {},
        tree,
    ),
}


def comparable(grads):
    return grads.stacked() if isinstance(grads, gf.GradStack) else grads


@pytest.mark.parametrize("case", STATELESS)
def test_a_scheduled_link_is_the_factory_called_by_hand_in_every_step(case):
    factory, schedules, fixed, grads_of = STATELESS[case]
    link, params = gf.scheduled(factory, **schedules, **fixed), normal_tree(100)
    state, moved = link.init(params), []
    at_first = factory(**{name: s(0).item() for name, s in schedules.items()}, **fixed)
    for k in range(STEPS):
        values = {name: schedule(k) for name, schedule in schedules.items()}
        by_hand = factory(**{name: v.item() for name, v in values.items()}, **fixed)
        expected, expected_out = run(by_hand, grads_of(k), params)
        grads, state, out = link.update(grads_of(k), state, params)
        assert_close(comparable(grads), comparable(expected))
        assert_close(out, expected_out | values)
        assert set(out) <= link.publishes
        unmoved = comparable(run(at_first, grads_of(k), params)[0])
        moved.append(not torch.equal(comparable(grads)["fc.weight"], unmoved["fc.weight"]))
    assert state["count"] == STEPS
    assert any(moved)  # the schedule matters


def test_a_factory_that_decorates_another_is_called_itself():
    @functools.wraps(gf.clip_by_global_norm)
    def halved(max_norm):
        return gf.clip_by_global_norm(max_norm / 2)

    link, params = gf.scheduled(halved, max_norm=gs.constant(2.0)), normal_tree(100)
    grads = link.update(tree(0), link.init(params), params)[0]
    assert_close(grads, run(gf.clip_by_global_norm(1.0), tree(0), params)[0])


@pytest.mark.parametrize("adaptive", [None, "asam", "gsam"])
def test_a_scheduled_radius_is_sam_perturb_called_by_hand(adaptive):
    params, batch = make_params(), make_batch()
    rho = gs.linear(0.5, 4, min_value=0.1, warmup_steps=2)
    link, stack = gf.scheduled(gf.sam_perturb, rho=rho, adaptive=adaptive), make_rows(params, batch)
    state = link.init(params)
    for k in range(5):
        again, state, out = link.update(stack, state, params)
        by_hand = gf.sam_perturb(rho(k).item(), adaptive=adaptive)
        assert_close(again.stacked(), run(by_hand, stack, params)[0].stacked())
        assert out["rho"] == rho(k)


def test_a_scheduled_alpha_is_gsam_decompose_called_by_hand():
    alpha, params = gs.linear(0.6, 3), normal_tree(0)
    link = gf.scheduled(gf.gsam_decompose, alpha=alpha)
    state, clean, h = link.init(params), normal_tree(1), normal_tree(2)
    for k in range(5):
        d, state, _ = link.update(h, state, params, clean_grads=clean)
        assert_close(d, run(gf.gsam_decompose(alpha(k).item()), h, clean_grads=clean)[0])


MOVING = {
    "sgd": {
        "momentum": gs.linear(0.9, 6, min_value=0.2, warmup_steps=2, init_value=0.5),
        "dampening": gs.linear(0.5, 4),
        "weight_decay": gs.cosine(0.1, 5),
    },
    "adam": {"weight_decay": gs.linear(0.1, 5), "eps": gs.step(0.1, 3)},
    "adamw": {"lr": gs.cosine(0.1, 6), "weight_decay": gs.linear(0.1, 5)},
    "rmsprop": {"alpha": gs.linear(0.99, 6, min_value=0.5), "momentum": gs.poly(0.9, -0.5)},
}


@pytest.mark.parametrize("rule", MOVING)
def test_a_scheduled_update_rule_is_the_factory_called_by_hand(rule):
    factory = getattr(gf, rule)
    schedules = {"lr": gs.constant(0.05), **MOVING[rule]}
    update, params = gf.scheduled(factory, **schedules), normal_tree(0)
    expected = params
    state, hand_state = update.init(params), None
    for k in range(STEPS):
        by_hand = factory(**{name: schedule(k).item() for name, schedule in schedules.items()})
        hand_state = by_hand.init(params) if hand_state is None else hand_state
        expected, hand_state, _ = by_hand(expected, hand_state, normal_tree(k + 1))
        params, state, info = update(params, state, normal_tree(k + 1))
        assert_close(params, expected)
        assert info[f"{rule}/lr"] == schedules["lr"](k)


def test_a_skipped_step_does_not_advance_a_schedule():
    update = gf.chain(
        gf.scheduled(gf.agc_clip, clipping=gs.linear(1.0, 10)), gf.sgd(gs.linear(0.1, 10))
    )
    params = normal_tree(0)
    state = update.init(params)
    clippings, lrs = [], []
    for k in range(6):
        keep = torch.tensor(k not in (1, 2))
        params, state, info = update(params, state, normal_tree(k), keep=keep)
        clippings.append(info["agc_clip/clipping"].item())
        lrs.append(info["sgd/lr"].item())
    assert clippings == pytest.approx([1.0, 0.9, 0.9, 0.9, 0.8, 0.7])
    assert lrs == pytest.approx([0.1, 0.09, 0.09, 0.09, 0.08, 0.07])


@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(7, dtype=torch.int32)])
def test_count_drives_every_schedule_and_nothing_else(count):
    lr, clipping = gs.cosine(0.1, 10, warmup_steps=3), gs.linear(1.0, 10)
    update = gf.chain(gf.scheduled(gf.agc_clip, clipping=clipping), gf.adam(lr))
    params, g = normal_tree(0), normal_tree(1)
    state = update.init(params)
    moved, driven, info = update(params, state, g, count=count)
    assert info["adam/lr"] == lr(7)
    assert info["agc_clip/clipping"] == clipping(7)
    # Bias correction still counts the steps applied.
    assert driven["adam"]["count"] == 1
    by_hand = gf.chain(gf.agc_clip(clipping(7).item()), gf.adam(lr(7).item()))
    assert_close(moved, by_hand(params, by_hand.init(params), g)[0])


def test_rho_and_lr_of_one_step_belong_together():
    params, batch, *_ = problem()
    lr = gs.cosine(0.1, 8, min_value=0.01, warmup_steps=3)
    rho = gs.proportional(lr, 0.02, 0.06)
    update = gf.chain(gf.mean_rows(), gf.scheduled(gf.sam_perturb, rho=rho), gf.sgd(lr))
    state = update.init(params)
    for k in range(10):
        keep = torch.tensor(k != 4)
        params, state, info = update(params, state, make_rows(params, batch), keep=keep)
        part = (info["sgd/lr"] - 0.01) / (0.1 - 0.01)
        assert_close(info["sam_perturb/rho"], 0.02 + (0.06 - 0.02) * part)
        assert info["sgd/lr"] == lr(k - (k > 4))


def test_a_metric_reaches_the_plateau_through_the_update():
    update = gf.chain(gf.agc_clip(0.1), gf.sgd(gs.plateau(0.1, factor=0.5, patience=0)))
    params = normal_tree(0)
    state, lrs = update.init(params), []
    for k, metric in enumerate((2.0, None, 3.0, 1.0, None, 1.0)):
        extra = {} if metric is None else {"value": torch.tensor(metric)}
        params, state, info = update(params, state, normal_tree(k), **extra)
        lrs.append(info["sgd/lr"].item())
    assert lrs == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05, 0.025])


def test_a_skipped_step_forgets_its_metric():
    update = gf.sgd(gs.plateau(0.1, factor=0.5, patience=0))
    params = normal_tree(0)
    state = update(params, update.init(params), params, value=torch.tensor(1.0))[1]
    skipped = update(params, state, params, value=torch.tensor(2.0), keep=torch.tensor(False))[1]
    assert_same(gf.state_dict(skipped), gf.state_dict(state))


def test_schedules_are_recognised_by_type_and_callables_are_not():
    with pytest.raises(ValueError, match="found lr=<function"):
        gf.adamw(lambda k: 0.1)
    with pytest.raises(TypeError, match="at least one Schedule"):
        gf.scheduled(gf.agree_filter, threshold=lambda k: 0.97)
    with pytest.raises(TypeError, match="at least one Schedule"):
        gf.scheduled(gf.agree_filter, threshold=0.97)
    # A function that is meant as a function is handed on as it is.
    excluding = gf.scheduled(gf.agc_clip, clipping=gs.constant(0.01), exclude=lambda name: True)
    g = normal_tree(1)
    assert_same(run(excluding, g)[0], g)


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"unknown \['limit'\]"):
        gf.scheduled(gf.agc_clip, limit=gs.constant(0.1))
    with pytest.raises(ValueError, match="found threshold=-1"):
        gf.scheduled(gf.agree_filter, threshold=gs.linear(-1, 10, min_value=-2))


# Every hyperparameter that is a number, of every factory

DOWN = gs.linear(0.9, 6, min_value=0.2)
EVERY = {
    "agree_filter": {"threshold": DOWN, "min_accepted": gs.linear(3.0, 6, min_value=1.0)},
    "consensus_filter": {"threshold": DOWN, "min_accepted": gs.linear(3.0, 6, min_value=1.0)},
    "sign_agreement": {"fraction": DOWN},
    "clip_per_row": {"max_norm": DOWN},
    "budget_clip": {"budget": DOWN, "power": DOWN},
    "normalize_rows": {"gamma": DOWN},
    "outlier_filter": {"factor": gs.linear(3.0, 6, min_value=1.0)},
    "trim_losses": {"fraction": DOWN},
    "reference_filter": {"threshold": DOWN, "decay": DOWN},
    "watch": {"decay": DOWN},
    "spike_clip": {"z": DOWN, "decay": DOWN, "factor": DOWN, "warmup_norm": DOWN},
    "spike_skip": {"sigmas": DOWN},
    "clip_by_global_norm": {"max_norm": DOWN},
    "agc_clip": {"clipping": DOWN, "eps": DOWN},
    "sam_perturb": {"rho": DOWN, "eta": DOWN},
    "friendly_sam": {"rho": DOWN, "sigma": DOWN, "decay": DOWN, "eta": DOWN},
    "look_sam": {"rho": DOWN, "alpha": DOWN, "eta": DOWN},
    "gsam_decompose": {"alpha": DOWN},
    "sgd": {"lr": DOWN, "momentum": DOWN, "dampening": DOWN, "weight_decay": DOWN},
    "adam": {"lr": DOWN, "betas": (DOWN, gs.linear(0.99, 6)), "eps": DOWN, "weight_decay": DOWN},
    "adamw": {"lr": DOWN, "betas": (0.8, DOWN), "eps": DOWN, "weight_decay": DOWN},
    "per_example_adam": {"lr": DOWN, "betas": (0.8, DOWN), "eps": DOWN, "weight_decay": DOWN},
    "rmsprop": {**{"lr": DOWN, "alpha": DOWN, "eps": DOWN, "weight_decay": DOWN, "momentum": DOWN}},
    "lion": {"lr": DOWN, "betas": (DOWN, gs.linear(0.99, 6)), "weight_decay": DOWN},
    "ema_params": {"decay": DOWN},
}
FIXED = {
    "sam_perturb": {"adaptive": "asam", "rho": 0.1},
    "friendly_sam": {"adaptive": "asam", "rho": 0.1},
    "look_sam": {"adaptive": "asam", "rho": 0.1, "k": 2},
    "rmsprop": {"lr": 0.1},
    "sgd": {"lr": 0.1},
    "reference_filter": {"reference": "average"},
    "spike_skip": {"of": "norm"},
}
NOT_NUMBERS = {
    *("against", "average", "soft", "exclude", "unit_dims", "adaptive", "per_microbatch"),
    *("nesterov", "maximize", "amsgrad", "centered", "per_leaf", "of", "center", "reference"),
    *("by", "every", "quantiles", "warmup", "window", "max_consecutive", "k", "per", "decays"),
}
TAKES_ROWS = {name for name in EVERY if "rows" in getattr(gf, name).__annotations__} | {
    *("agree_filter", "consensus_filter", "sign_agreement", "clip_per_row", "budget_clip"),
    *(
        "sam_perturb",
        "friendly_sam",
        "normalize_rows",
        "outlier_filter",
        "trim_losses",
        "reference_filter",
    ),
    "watch",
}


def placed(name, link):
    """A chain from rows to an update with the link where it belongs."""
    if name in ("agree_filter", "consensus_filter", "sign_agreement", "reference_filter"):
        return gf.chain(link, gf.sgd(0.1))
    if name in TAKES_ROWS:
        return gf.chain(link, gf.mean_rows(), gf.sgd(0.1))
    if name == "gsam_decompose":
        return gf.chain(gf.mean_rows(), gf.sam_perturb(0.1), link, gf.sgd(0.1))
    if name == "ema_params":
        return gf.chain(gf.mean_rows(), gf.sgd(0.1), link)
    rule = name in ("sgd", "adam", "adamw", "rmsprop", "lion", "per_example_adam")
    return gf.chain(gf.mean_rows(), link, *([] if rule else [gf.sgd(0.1)]))


def value_at(thing, k):
    if isinstance(thing, gf.Schedule):
        return thing(k).item()
    return tuple(value_at(part, k) for part in thing) if isinstance(thing, tuple) else thing


def test_every_number_of_every_factory_is_in_the_table():
    for name, given in EVERY.items():
        parameters = set(inspect.signature(getattr(gf, name)).parameters)
        assert parameters - NOT_NUMBERS == set(given)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in EVERY for argument in EVERY[name]]
)
def test_any_hyperparameter_follows_its_schedule(name, argument):
    factory, moving = getattr(gf, name), EVERY[name][argument]
    fixed = {key: v for key, v in FIXED.get(name, {}).items() if key != argument}
    update = placed(name, gf.scheduled(factory, **{argument: moving}, **fixed))
    params, batch = make_params(), make_batch()
    expected, hand_state, state = params, None, update.init(params)
    k = 0  # steps that were applied
    for _ in range(STEPS):
        by_hand = placed(name, factory(**{argument: value_at(moving, k)}, **fixed))
        hand_state = by_hand.init(expected) if hand_state is None else hand_state
        expected, hand_state, _ = by_hand(expected, hand_state, make_rows(expected, batch))
        params, state, info = update(params, state, make_rows(params, batch))
        assert_close(params, expected, rtol=1e-8)
        parts = [(argument, moving)]
        if isinstance(moving, tuple):
            parts = [(f"{argument}.{i}", part) for i, part in enumerate(moving)]
        for key, part in parts:
            if isinstance(part, gf.Schedule):
                assert info[f"{name}/{key}"] == part(k)
        k += int(info["keep"])
    assert k > 0
    assert gf.load_state_dict(update.init(params), gf.state_dict(state)).keys() == state.keys()


def test_a_schedule_that_remembers_inside_a_tuple():
    beta = gs.plateau(0.9, factor=0.5, patience=0)
    update = gf.scheduled(gf.adam, lr=0.1, betas=(beta, 0.999))
    params = normal_tree(0)
    state = update.init(params)
    for k in range(3):
        params, state, info = update(params, state, normal_tree(k), value=torch.tensor(1.0))
    assert info["adam/betas.0"] == pytest.approx(0.225)
    assert "schedules.betas.0.best" in gf.state_dict(state)
