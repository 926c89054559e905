"""The quantities that the studies of label noise and of double descent measure."""

import json
import math
from pathlib import Path

import pytest
from benchmarks._many_digits import Tried, check_against_the_lab
from benchmarks._noise_rules import candidates, rules
from benchmarks._noise_runs import Done, Task, build_run
from benchmarks._random_features import measure

from benchmarks import _noise_runs, _row_weights, double_descent, label_noise
from gradfilter.lab.train._training import advance


def test_the_peak_of_ridgeless_random_features_is_at_p_equal_to_n():
    points = [measure(p, samples=60, noise=0.2, seed=0) for p in (20, 40, 60, 80, 240)]
    assert max(points, key=lambda point: point.test_mse).features == 60
    assert max(points, key=lambda point: point.lipschitz).features == 60
    assert max(points, key=lambda point: point.weight_norm).features == 60
    assert [point.train_error for point in points[2:]] == [0, 0, 0]
    for point in points:
        assert point.lipschitz == pytest.approx(point.closed_form, rel=1e-9)


def test_a_width_is_trained_as_the_preset_says_and_measured():
    line = double_descent.width_line(4, seed=1, epochs=1.0)
    assert line["steps"] == 16 and line["parameters"] == 64 * 4 + 4 + 16 + 4 + 40 + 10
    assert line["lipschitz"] > 0 and 0 < line["train_error"] < 1


@pytest.mark.parametrize("rule", [*rules(), *candidates()], ids=lambda rule: rule.name)
def test_every_rule_trains_on_the_same_samples(rule):
    run = build_run(rule, Task(rule.name, 0.05, 0.3, 0, True))
    plain = build_run(rules()[0], Task("plain", 0.05, 0.3, 0, True))
    for own, other in zip(run.order(0, 3), plain.order(0, 3), strict=True):
        assert sorted(own.tolist()) == sorted(other.tolist())
    before = run.state["params"]["head.weight"].clone()
    advance(run, 2)
    assert run.state["params"]["head.weight"].isfinite().all()
    kept = run.skipped.item()
    assert kept == 2 or (run.state["params"]["head.weight"] != before).any()


def test_the_rate_is_chosen_on_the_validation_split_and_reported_on_the_test_split(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(label_noise, "rules", lambda: rules()[:2])
    monkeypatch.setattr(label_noise, "step_costs", lambda chosen, rounds: {
        chosen[0].name: 1.0, chosen[1].name: 2.0,
    })  # fmt: skip

    def all_of(self, tasks, jobs, label):
        for task in tasks:
            # The best rate is 0.1; by the test split of that run it would be another.
            val = 0.9 - abs(task.learning_rate - 0.1) if task.validate else None
            curve = [
                {
                    "val_accuracy": val,
                    "test_accuracy": 0.5 + 0.01 * k + 0.001 * task.seed,
                    "memorised": 0.01 * k,
                    "train_clean_accuracy": 0.5,
                }
                for k in range(30)
            ]
            line = {**task.__dict__, "seconds": 1.0, "curve": curve}
            self.found[_noise_runs._key(line)] = line

    monkeypatch.setattr(Done, "all_of", all_of)
    label_noise.main(["--out", str(tmp_path)])
    written = json.loads((tmp_path / "label_noise-cpu.json").read_text())
    plain, clip = written["rules"]
    assert plain["learning_rate"] == clip["learning_rate"] == 0.1
    same = plain["noise"]["0.3"]["equal_samples"]
    assert same["final"]["mean"] == pytest.approx(0.5 + 0.29 + 0.002)
    assert same["final"]["sd"] == pytest.approx(0.00158, abs=1e-5) and same["steps"] == 1500
    # A step of twice the cost: half of the steps in the same time.
    half = clip["noise"]["0.3"]["equal_time"]
    assert half["steps"] == 750 and half["final"]["mean"] == pytest.approx(0.5 + 0.14 + 0.002)
    assert "clip 1 per sample" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plain", "clip 1 per sample", "budget 0.3, power 3", "consensus"])
def test_what_the_search_trains_is_what_the_links_do(name):
    weighs = {
        "plain": _row_weights.mean,
        "clip 1 per sample": _row_weights.clip(1.0),
        "budget 0.3, power 3": _row_weights.budget(0.3, power=3.0, relative=True),
        "consensus": _row_weights.consensus(limit=1.0),
    }
    rule = {**{r.name: r for r in candidates()}, "consensus": soft_and_clipped()}[name]
    check_against_the_lab(Tried(name, weighs[name], 0.1), rule, steps=20)
    with pytest.raises(AssertionError):
        check_against_the_lab(Tried(name, _row_weights.clip(0.5), 0.1), rule, steps=20)


def soft_and_clipped():
    return next(rule for rule in candidates() if rule.name == "consensus, soft, clip 1")


@pytest.mark.parametrize("best", [0.001, 0.02, 0.1, 1.0])
def test_the_grid_of_rates_grows_until_the_best_is_inside(best, monkeypatch):
    def all_of(self, tasks, jobs, label):
        for task in tasks:
            near = abs(math.log(task.learning_rate / best))
            self.found[tuple(vars(task).values())] = {"curve": [{"val_accuracy": -near}]}

    monkeypatch.setattr(Done, "all_of", all_of)
    chosen = label_noise.study("clean")
    ((rate, means),) = label_noise.sweep(Done(Path("none")), chosen, 1).values()
    assert rate == best
    tried = sorted(means)
    assert tried[0] < best or best == chosen.ladder[0]
    assert tried[-1] > best or best == chosen.ladder[-1]
