"""Schedules at their corner steps, against the formulas."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close

TOP, LOW = 0.8, 0.05
# (Wm, T): no warm-up, some, one step, nothing but warm-up, one step in all.
SPANS = [(0, 10), (4, 10), (1, 7), (6, 6), (0, 1)]
every_span = pytest.mark.parametrize(("warmup", "total"), SPANS)
every_init = pytest.mark.parametrize("init", [None, 0.0, 0.3])


def corners(warmup, total):
    steps = {0, warmup - 1, warmup, warmup + 1, warmup + 2, total - 1, total, total + 5}
    return sorted(k for k in steps if k >= 0)


def assert_schedule(schedule, curve, warmup, total, init, low=LOW):
    """At every corner: the ramp from init (min by default) before Wm, the curve from Wm on."""
    start = low if init is None else init
    for k in corners(warmup, total):
        expected = start + (TOP - start) * k / warmup if k < warmup else curve(k)
        for count in (k, torch.tensor(k), torch.tensor(k, dtype=torch.int32)):
            value = schedule(count)
            assert value.shape == ()
            assert value.dtype == torch.float64
            assert value.item() == pytest.approx(expected, rel=1e-14)


def progress(k, warmup, total):
    if total == warmup:
        return 0.0  # constant max
    return min((k - warmup) / (total - warmup), 1.0)


@every_span
@every_init
def test_linear(warmup, total, init):
    schedule = gs.linear(TOP, total, min_value=LOW, warmup_steps=warmup, init_value=init)
    curve = lambda k: TOP + (LOW - TOP) * progress(k, warmup, total)
    assert_schedule(schedule, curve, warmup, total, init)


@every_span
@every_init
def test_cosine(warmup, total, init):
    schedule = gs.cosine(TOP, total, min_value=LOW, warmup_steps=warmup, init_value=init)

    def curve(k):
        x = progress(k, warmup, total)
        return LOW + (TOP - LOW) * (1 + math.cos(math.pi * x)) / 2

    assert_schedule(schedule, curve, warmup, total, init)


@every_span
@every_init
@pytest.mark.parametrize("power", [-0.5, -1.0, -2, 0])
def test_poly(warmup, total, init, power):
    schedule = gs.poly(TOP, power, min_value=LOW, warmup_steps=warmup, init_value=init)
    curve = lambda k: LOW + (TOP - LOW) * (k - warmup + 1) ** power
    assert_schedule(schedule, curve, warmup, total, init)


@every_span
@every_init
@pytest.mark.parametrize(("every", "factor"), [(1, 0.5), (3, 0.1), (2, 1.0)])
def test_step(warmup, total, init, every, factor):
    schedule = gs.step(TOP, every, factor, min_value=LOW, warmup_steps=warmup, init_value=init)
    curve = lambda k: max(LOW, TOP * factor ** ((k - warmup) // every))
    assert_schedule(schedule, curve, warmup, total, init)


@every_span
@every_init
def test_constant(warmup, total, init):
    schedule = gs.constant(TOP, warmup_steps=warmup, init_value=init)
    assert_schedule(schedule, lambda k: TOP, warmup, total, init, low=0.0)


@every_span
@every_init
def test_plateau_without_a_metric_is_constant(warmup, total, init):
    schedule = gs.plateau(TOP, min_value=LOW, warmup_steps=warmup, init_value=init)
    assert_schedule(schedule, lambda k: TOP, warmup, total, init)


def test_schedules_are_in_their_module_and_not_at_the_top():
    names = {name for name, thing in vars(gs).items() if callable(thing)}
    assert names == {"constant", "cosine", "linear", "plateau", "poly", "proportional", "step"}
    for name in names:
        assert name not in gf.__all__ and not hasattr(gf, name)
        with pytest.raises(
            AttributeError, match=rf"no attribute '{name}'. Write gf.schedules.{name}.$"
        ):
            getattr(gf, name)
    assert gf.schedules.step is gs.step and gs.step.__module__ == "gradfilter.schedules._schedules"


@pytest.mark.parametrize("make", [gs.linear, gs.cosine])
def test_a_whole_run_of_warm_up_stays_at_the_top(make):
    schedule = make(TOP, 6, min_value=LOW, warmup_steps=6)
    assert [schedule(k).item() for k in (6, 7, 1000)] == [TOP] * 3


def values_of(schedule, metrics):
    """The values over some steps, each with a metric or None."""
    state, values = schedule.init(torch.tensor(0)), []
    for k, metric in enumerate(metrics):
        value, state = schedule.at(torch.tensor(k), state, value=metric)
        values.append(value.item())
    return values


@given(
    metrics=st.lists(st.none() | st.floats(1e-3, 1e3), min_size=1, max_size=30),
    mode=st.sampled_from(["min", "max"]),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_plateau_is_reduce_lr_on_plateau(metrics, mode, factor, patience, threshold):
    """For metrics > 0; where they are negative torch counts some that got worse as better."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=TOP)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor, patience, threshold, min_lr=LOW, eps=0
    )
    sign, expected = 1 if mode == "min" else -1, []
    for metric in metrics:
        if metric is not None:
            bar = theirs.best * (1 - sign * threshold)
            assume(threshold == 0 or abs(metric - bar) > 1e-9 * metric)  # ties up to rounding
            theirs.step(metric)
        expected.append(optimizer.param_groups[0]["lr"])
    schedule = gs.plateau(
        TOP, factor=factor, patience=patience, threshold=threshold, mode=mode, min_value=LOW
    )
    given_metrics = [m if m is None else torch.tensor(m, dtype=torch.float64) for m in metrics]
    assert values_of(schedule, given_metrics) == pytest.approx(expected, rel=1e-12)


def test_plateau_measures_improvement_of_negative_metrics_by_their_size():
    schedule = gs.plateau(1.0, factor=0.5, patience=0, threshold=0.1)
    metrics = [-10.0, -10.5, -11.5, -12.0, -13.0]  # better by 5, 15, 4 and 13 per cent
    values = values_of(schedule, [torch.tensor(m) for m in metrics])
    assert values == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_plateau_counts_a_metric_that_is_not_a_number_as_no_improvement():
    schedule = gs.plateau(1.0, factor=0.5, patience=0)
    metrics = [torch.tensor(m) for m in (3.0, float("nan"), 2.0)]
    assert values_of(schedule, metrics) == [1.0, 0.5, 0.5]


RHO_MIN, RHO_MAX = 0.02, 0.06


def proportional(lr, lr_min, lr_max):
    part = (lr - lr_min) / (lr_max - lr_min)
    return RHO_MIN + (RHO_MAX - RHO_MIN) * min(max(part, 0.0), 1.0)


@pytest.mark.parametrize("make", [gs.linear, gs.cosine])
@every_span
def test_proportional_follows_the_lr_of_the_same_step(make, warmup, total):
    lr = make(TOP, total, min_value=LOW, warmup_steps=warmup)
    rho = gs.proportional(lr, RHO_MIN, RHO_MAX)
    for k in corners(warmup, total):
        assert rho(k).shape == ()
        assert_close(rho(k).item(), proportional(lr(k).item(), LOW, TOP))
    assert_close(rho(warmup).item(), RHO_MAX)


@pytest.mark.parametrize("init", [0.0, 2.0])
def test_proportional_is_clamped_where_the_warm_up_starts_outside_the_range(init):
    lr = gs.cosine(TOP, 10, min_value=LOW, warmup_steps=4, init_value=init)
    rho = gs.proportional(lr, RHO_MIN, RHO_MAX)
    for k in range(14):
        assert_close(rho(k).item(), proportional(lr(k).item(), LOW, TOP))
    assert_close(rho(0).item(), RHO_MIN if init < LOW else RHO_MAX)
    assert_close(rho(10).item(), RHO_MIN)


def test_proportional_to_an_lr_of_ones_own_is_clamped():
    lr = gf.Schedule(lambda count, state, **extra: (0.1 * count.double(), state), 0.5, 0.2)
    rho = gs.proportional(lr, RHO_MIN, RHO_MAX)
    for k in range(8):
        assert_close(rho(k).item(), proportional(0.1 * k, 0.2, 0.5))


def test_proportional_to_an_lr_that_does_not_vary_is_the_largest_rho():
    for lr in (gs.constant(0.1), gs.linear(0.1, 10, min_value=0.1)):
        rho = gs.proportional(lr, RHO_MIN, RHO_MAX)
        assert [rho(k).item() for k in (0, 5, 20)] == [RHO_MAX] * 3


def test_proportional_follows_a_plateau_through_its_metric():
    lr = gs.plateau(TOP, factor=0.5, patience=0)
    metrics = [torch.tensor(m) for m in (1.0, 1.0, 2.0, 0.5)]
    expected = [proportional(value, 0, TOP) for value in values_of(lr, metrics)]
    assert len(set(expected)) == 3
    rho = gs.proportional(lr, RHO_MIN, RHO_MAX)
    assert values_of(rho, metrics) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.linear(1.0, 5, warmup_steps=6), "total_steps >= warmup_steps"),
        (lambda: gs.cosine(1.0, 0), "found total_steps=0"),
        (lambda: gs.cosine(1.0, 5, warmup_steps=-1), "whole warmup_steps >= 0, found -1"),
        (lambda: gs.linear(1.0, 5, warmup_steps=1.5), r"found 1\.5"),
        (lambda: gs.linear(0.1, 5, min_value=0.2), "min_value <= max_value, found min_value=0.2"),
        (lambda: gs.poly(1.0, 0.5), r"power <= 0, found power=0\.5"),
        (lambda: gs.step(1.0, 0), "found every=0"),
        (lambda: gs.step(1.0, 1, 1.5), r"factor=1\.5"),
        (lambda: gs.plateau(1.0, factor=1.0), r"found factor=1\.0"),
        (lambda: gs.plateau(1.0, patience=-1), "patience=-1"),
        (lambda: gs.plateau(1.0, mode="auto"), "mode='auto'"),
        (lambda: gs.plateau(0.1, min_value=0.2), "min_value <= max_value, found min_value=0.2"),
        (lambda: gs.proportional(gs.constant(1.0), 0.2, 0.1), "found 0.2, 0.1"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
