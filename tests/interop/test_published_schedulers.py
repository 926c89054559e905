"""The published schedulers against the formulas: lr and ρ of one step have one count."""

import math

import pytest
import torch

from _naive import assert_close
from gradfilter.interop import (
    GSAM,
    CosineScheduler,
    LinearScheduler,
    PolyScheduler,
    ProportionScheduler,
    StepScheduler,
)

TOP, LOW, START = 0.8, 0.05, 0.02
SPANS = [(0, 10), (4, 10), (1, 7), (6, 6), (0, 1)]  # (Wm, T)
every_span = pytest.mark.parametrize(("warmup", "total"), SPANS)


def progress(k, warmup, total):
    return 0.0 if total == warmup else min((k - warmup) / (total - warmup), 1.0)


def linear(k, warmup, total):
    return TOP + (LOW - TOP) * progress(k, warmup, total)


def cosine(k, warmup, total):
    return LOW + (TOP - LOW) * (1 + math.cos(math.pi * progress(k, warmup, total))) / 2


def poly(k, warmup, total):
    return LOW + (TOP - LOW) * (k - warmup + 1) ** -0.5


def stairs(k, warmup, total):
    every = max(1, math.ceil(0.3 * (total - warmup) - 1e-9))
    return max(LOW, TOP * 0.2 ** ((k - warmup) // every))


CURVES = {
    LinearScheduler: linear,
    CosineScheduler: cosine,
    PolyScheduler: poly,
    StepScheduler: stairs,
}
every_scheduler = pytest.mark.parametrize("scheduler", CURVES)


def expected(scheduler, warmup, total):
    """Values at k = 0, 1, ..., some beyond the end."""
    curve = CURVES[scheduler]
    ramp = [START + (TOP - START) * k / warmup for k in range(warmup)]
    return ramp + [curve(k, warmup, total) for k in range(warmup, total + 4)]


def optimizer(lr=7.0, groups=1):
    return torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in range(groups)], lr=lr)


@every_scheduler
@every_span
@pytest.mark.parametrize("spelling", ["warmup_steps", "warmup_step"])
def test_values_without_an_optimizer_start_at_step_zero(scheduler, warmup, total, spelling):
    made = scheduler(
        T_max=total, max_value=TOP, min_value=LOW, init_value=START, **{spelling: warmup}
    )
    wanted = expected(scheduler, warmup, total)
    assert made.lr() == pytest.approx(wanted[0], rel=1e-14)
    for value in wanted:
        found = made.step()
        assert type(found) is float
        assert found == made.lr() == pytest.approx(value, rel=1e-14)


@every_scheduler
@every_span
def test_an_optimizer_has_the_lr_of_its_step_in_every_group(scheduler, warmup, total):
    base = optimizer(groups=2)
    base.param_groups[1]["lr"] = held = torch.tensor(7.0, dtype=torch.float64)
    made = scheduler(
        T_max=total,
        max_value=TOP,
        min_value=LOW,
        init_value=START,
        warmup_steps=warmup,
        optimizer=base,
    )
    for value in expected(scheduler, warmup, total):
        assert base.param_groups[0]["lr"] == pytest.approx(value, rel=1e-14)
        assert held.item() == pytest.approx(value, rel=1e-14)
        assert base.param_groups[1]["lr"] is held
        made.step()


@every_scheduler
def test_lr_and_rho_of_every_step_have_one_count(scheduler):
    """The published order of calls: (lr − lr_min) / (lr_max − lr_min) is that of ρ, from step 0."""
    model = torch.nn.Linear(2, 1)
    base = torch.optim.SGD(model.parameters(), lr=123.0)
    spans = {"T_max": 9, "warmup_step": 3}
    # Halves, so that the stairs go down to min at the same step.
    lr = scheduler(max_value=0.1, min_value=0.001, init_value=0.0, optimizer=base, **spans)
    rho = scheduler(max_value=0.5, min_value=0.005, init_value=0.0, **spans)
    gsam = GSAM(model.parameters(), base, model, 0.4, rho)
    seen = []
    for _ in range(12):
        gsam.set_closure(torch.nn.functional.mse_loss, torch.ones(4, 2), torch.zeros(4, 1))
        gsam.step()
        seen.append(base.param_groups[0]["lr"])
        assert gsam.rho_t == pytest.approx(5 * base.param_groups[0]["lr"], abs=1e-15)
        lr.step()
        gsam.update_rho_t()
    assert seen[0] == 0 and seen[3] == pytest.approx(0.1) and len(set(seen)) > 4


def test_published_positions_of_arguments():
    base = optimizer()
    made = LinearScheduler(10, TOP, LOW, START, 4, base)
    assert base.param_groups[0]["lr"] == pytest.approx(START)
    assert made.step() == pytest.approx(START + (TOP - START) / 4)
    power = PolyScheduler(-1.0, 10, TOP, LOW, START, 0)
    assert [power.step() for _ in range(2)] == pytest.approx([TOP, LOW + (TOP - LOW) / 2])


def test_stairs_of_ones_own():
    made = StepScheduler(100, 1.0, every=2, factor=0.5, min_value=0.3)
    assert [made.step() for _ in range(6)] == [1, 1, 0.5, 0.5, 0.3, 0.3]


@every_scheduler
def test_a_checkpoint_goes_on_at_its_count(scheduler):
    first = scheduler(T_max=10, max_value=TOP)
    values = [first.step() for _ in range(4)]
    base = optimizer()
    again = scheduler(T_max=10, max_value=TOP, optimizer=base)
    again.load_state_dict(first.state_dict())
    assert base.param_groups[0]["lr"] == again.lr() == values[-1]
    assert again.step() == first.step() == base.param_groups[0]["lr"]


def test_proportion_follows_schedulers_of_torch_and_ours():
    base = optimizer(lr=TOP)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=8, eta_min=LOW)
    other = optimizer()
    ours = CosineScheduler(T_max=8, max_value=TOP, min_value=LOW, optimizer=other)
    rhos = [ProportionScheduler(s, TOP, LOW, 0.6, 0.2) for s in (theirs, ours)]
    for k in range(9):
        value = 0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) / 2
        for rho in rhos:
            assert_close(rho.step(), value)
            assert_close(rho.lr(), value)  # reading does not move it
        base.step()
        theirs.step()
        ours.step()


def test_proportion_is_clamped_and_at_the_top_where_the_lr_does_not_vary():
    base = optimizer(lr=1.0)
    lr = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
    assert ProportionScheduler(lr, 0.5, 0.1, 0.6, 0.2).step() == 0.6
    assert_close(ProportionScheduler(lr, 3.0, 2.0, 0.6, 0.2).step(), 0.2)
    assert ProportionScheduler(lr, 1.0, 1.0, 0.6, 0.2).step() == 0.6


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearScheduler(5, 1.0, warmup_steps=6), ValueError, "total_steps >= warmup"),
        (
            lambda: CosineScheduler(5, 1.0, warmup_steps=1, warmup_step=2),
            TypeError,
            "found both",
        ),
        (lambda: PolyScheduler(0.5, 10, 1.0), ValueError, "power <= 0"),
        (lambda: StepScheduler(10, 1.0, factor=2.0), ValueError, r"factor=2\.0"),
        (lambda: ProportionScheduler(None, 0.1, 0.2, 1.0, 0.0), ValueError, "min_lr <= max_lr"),
        (lambda: ProportionScheduler(None, 0.2, 0.1, 0.0, 1.0), ValueError, "rho_min <= rho_max"),
    ],
)
def test_impossible_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
