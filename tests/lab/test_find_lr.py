"""The learning rate finder: the range test, its command, its files and its refusals."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from _lab import command, refused
from gradfilter.lab._find_lr import (
    find_learning_rate,
    rising_rates,
    run_rate_test,
    suggestion_text,
)
from gradfilter.lab._find_lr_config import parse_find_lr
from gradfilter.lab._usage import UsageError

SMALL = ("--model", "mlp_16", "--rates", "40")


def quadratic(curvatures, noise=0.0, momentum=0.0):
    """Steps of gradient descent on Σ L x² / 2, with noise on the losses that are seen."""
    curvatures = np.array(curvatures)
    draw = np.random.default_rng(0)

    def step(state, number, rate):
        x, velocity = state
        loss = float((curvatures * x * x).sum() / 2)
        velocity = momentum * velocity + curvatures * x
        return (x - rate * velocity, velocity), loss * (1 + noise * draw.standard_normal())

    return step, (np.ones(len(curvatures)), np.zeros(len(curvatures)))


# The test itself


@pytest.mark.parametrize("curvature", [0.03, 1.0, 40.0])
@pytest.mark.parametrize(("count", "late"), [(500, 1.4), (2000, 1.15)])
def test_a_quadratic_diverges_at_its_stability_limit(curvature, count, late):
    """It is seen after a few more steps, which are smaller if there are more of them."""
    limit = 2 / curvature
    found = find_learning_rate(
        *quadratic([curvature]), rising_rates(1e-4 / curvature, 100 / curvature, count)
    )
    assert limit < found.diverged < late * limit
    assert found.lowest == pytest.approx(limit, rel=0.3)
    assert found.suggested == found.lowest / 10
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < count


def test_momentum_moves_the_limit_to_2_times_1_plus_momentum():
    step, state = quadratic([1.0], momentum=0.5)
    found = find_learning_rate(step, state, rising_rates(1e-3, 100, 1000))
    assert 2 * 1.5 < found.diverged < 1.5 * 2 * 1.5


def test_noise_of_the_losses_is_smoothed_away():
    rates = rising_rates(1e-3, 10, 400)
    found = find_learning_rate(*quadratic([1.0, 0.3], noise=0.1), rates)
    quiet = find_learning_rate(*quadratic([1.0, 0.3]), rates)
    assert found.suggested == pytest.approx(quiet.suggested, rel=0.2)
    roughness = [np.abs(np.diff(curve)).mean() for curve in (found.smoothed, found.losses)]
    assert roughness[0] < 0.4 * roughness[1]


def test_noise_alone_has_no_suggestion_and_does_not_diverge():
    draw = np.random.default_rng(0)
    for _ in range(20):
        found = find_learning_rate(
            lambda s, n, r: (s, float(draw.uniform(2, 2.6))), None, rising_rates(1e-5, 10, 200)
        )
        assert (found.suggested, found.diverged) == (None, None)


def test_a_loss_that_is_not_finite_ends_the_test_at_its_rate():
    def step(state, number, rate):
        return state + 1, 3.0 - 0.01 * number if rate < 0.1 else math.nan

    rates = rising_rates(1e-3, 1, 100)
    found = find_learning_rate(step, 0, rates)
    assert found.diverged == min(rate for rate in rates if rate >= 0.1)
    assert max(found.rates) < 0.1 and all(map(math.isfinite, found.losses))


def test_a_first_loss_that_is_not_finite_is_an_error_of_its_own():
    for first in (math.nan, math.inf):
        found = partial(lambda loss, s, n, r: (s, loss), first)
        with pytest.raises(UsageError, match="before the first step is not finite"):
            find_learning_rate(found, None, rising_rates(1e-3, 1, 20))


def test_a_loss_that_never_falls_has_no_suggestion():
    rising = find_learning_rate(lambda s, n, r: (s, 1.0 + n), 0, rising_rates(1e-3, 1, 20))
    level = find_learning_rate(lambda s, n, r: (s, 1.0), 0, rising_rates(1e-3, 1, 20))
    assert rising.suggested is level.suggested is None
    assert suggestion_text(level, 1.0, 0).startswith("no suggestion")


def test_a_range_that_ends_before_the_loss_diverges_is_said():
    found = find_learning_rate(*quadratic([1.0]), rising_rates(1e-3, 0.5, 100))
    assert found.diverged is None
    assert "did not diverge up to --high 0.5" in suggestion_text(found, 0.5, 0)


def test_the_rates_have_equal_ratios_and_the_bounds_themselves():
    rates = rising_rates(1e-4, 3.0, 50)
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-4), 3.0, 50)
    np.testing.assert_allclose(np.diff(np.log(rates)), math.log(3e4) / 49)


def test_a_range_of_all_numbers_has_finite_rates():
    rates = rising_rates(1e-300, 1e300, 20)
    assert all(map(math.isfinite, rates)) and rates == sorted(set(rates))


def test_losses_below_zero_and_near_the_largest_number():
    rates = rising_rates(1e-3, 1, 40)
    negative = find_learning_rate(lambda s, n, r: (s, -1.0), 0, rates)
    huge = find_learning_rate(lambda s, n, r: (s, 1e308), 0, rates)
    assert negative.diverged is huge.diverged is None
    falls_then_rises = lambda s, n, r: (s, -1.0 - n if n < 20 else -20.0 + 10.0 * (n - 19))
    assert find_learning_rate(falls_then_rises, 0, rates).diverged is not None


@pytest.mark.parametrize(
    ("low", "high", "count", "option"),
    [
        *((0.0, 1.0, 50, "--low"), (-1.0, 1.0, 50, "--low"), (math.nan, 1.0, 50, "--low")),
        *((1.0, 1.0, 50, "--high"), (1.0, 0.1, 50, "--high"), (1.0, math.inf, 50, "--high")),
        *((0.1, 1.0, 19, "--rates"), (0.1, 1.0, -1, "--rates"), (0.1, 1.0, 10**9, "--rates")),
        (1.0, 1.0000000000000002, 50, "--high"),
    ],
)
def test_bad_ranges_are_refused(low, high, count, option):
    with pytest.raises(UsageError, match=option):
        rising_rates(low, high, count)


# The command


def test_the_command_writes_what_it_found_and_touches_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("find-lr", *SMALL, "--out", "found")
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["found"]  # no runs
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"find-lr.json", "find-lr.png"}
    found = json.loads((tmp_path / "found" / "find-lr.json").read_text())
    assert f"suggested: --learning-rate {found['suggested']:.2g}" in out
    assert 1e-3 < found["suggested"] < 1 and found["suggested"] == found["lowest"] / 10
    assert found["diverged"] is None or found["diverged"] > found["lowest"]
    assert found["settings"]["model"] == "mlp_16"
    assert (tmp_path / "found" / "find-lr.png").read_bytes().startswith(b"\x89PNG")


def test_the_global_random_numbers_are_as_they_were():
    asked = parse_find_lr([*SMALL, "--model-additions", "dropout-0.5"])
    run_rate_test(asked, lambda: None)  # packages draw some while they are imported
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    once, _ = run_rate_test(asked, lambda: None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(1234)
    assert run_rate_test(asked, lambda: None)[0] == once


def test_the_seed_decides_everything():
    once, again, other = (command("find-lr", *SMALL, "--seed", seed)[1] for seed in (0, 0, 1))
    assert once == again != other


def test_the_rule_decides_the_rate():
    def suggested(*options):
        _, out, _ = command("find-lr", *SMALL, *options)
        return float(out.split("--learning-rate ")[1].split(",")[0])

    sgd, adam = suggested(), suggested("--optimizer", "adam")
    assert adam < sgd / 2


def test_the_first_loss_is_that_of_train_and_the_rates_are_used():
    """With tiny rates, the losses are those of the untouched parameters."""
    asked = parse_find_lr([*SMALL, "--low", "1e-12", "--high", "1e-11"])
    still, skipped = run_rate_test(asked, lambda: None)
    rising, _ = run_rate_test(replace(asked, low=1e-12, high=1e2), lambda: None)
    assert rising.losses[:15] == pytest.approx(still.losses[:15], abs=1e-3)  # up to 1e-7
    moved, _ = run_rate_test(replace(asked, low=1e-2, high=1.0), lambda: None)
    assert skipped == 0 and still.losses[0] == moved.losses[0]
    assert max(still.losses) - min(still.losses) < 0.3 < still.losses[0] - min(moved.smoothed)


def test_a_filter_that_skips_everything_is_said_and_has_no_suggestion():
    options = ("--agree", "0", "--microbatches", "8")
    code, out, _ = command("find-lr", *SMALL, *options)
    assert "40 of 40 steps were skipped by the filter" in out
    assert code == 1 and "no suggestion: the filter skipped every step" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--low", "0"), "--low: expected a positive number, found 0"),
        (("--low", "1", "--high", "0.1"), "--high: expected a number above --low 1, found 0.1"),
        (("--rates", "3"), "--rates: expected at least 20, found 3"),
        (("--learning-rate", "0.1"), "--learning-rate: it would change nothing"),
        (("--learning_rate", "0.1"), "--learning-rate: it would change nothing"),
        (("--no_resume",), "--resume: it would change nothing"),
        (("--schedule=cosine",), "--schedule: it would change nothing"),
        (("--epochs", "3"), "--epochs: it would change nothing"),
        (("--momentum", "2"), "--momentum: expected a number in"),
        (("--betas", "0.9", "0.99"), "--betas: it would change nothing without --optimizer adam"),
        (("--device", "nowhere"), "--device"),
        (("--lwo", "1"), "Did you mean --low?"),
    ],
)
def test_bad_options_are_one_line(options, words):
    assert words in refused("find-lr", *options)


def test_a_full_directory_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "new or empty directory" in refused("find-lr", *SMALL, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_preset_s_schedule_is_replaced_and_help_says_what_is_refused():
    code, out, _ = command("find-lr", "--help")
    assert code == 0 and "options of train that are refused here" in out
    assert out.index("--low") < out.index("refused here") < out.index("--learning-rate")
    code, out, _ = command(
        "find-lr", "--preset", "demo-consensus", "--rates", "20", "--model", "mlp_8"
    )
    assert code in (0, 1) and "learning rate" in out
