"""Options of `gradfilter sweep`: merged, refused, or equal for all that join a study."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from _lab import command
from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._bracketed_values import quoted_value, split_values
from gradfilter.lab.sweep._join import HEARTBEAT, KEY, joined_study
from gradfilter.lab.sweep._sweep_command import parse_sweep, rows_of

SEARCH = ["--metric", "test_accuracy", "--sample"]


def plan_of(*options):
    return parse_sweep(options)[1]


def configs(*options):
    plan = plan_of(*options)
    return [plan.config_of(point) for point in plan.points]


def test_nesterov_on_an_axis_is_two_settings():
    found = configs("--grid", "optimizer=sgd,sgd+nesterov,adam", "seed=0,1")
    assert [(c.optimizer, c.nesterov) for c in found[::2]] == [
        ("sgd", False),
        ("sgd", True),
        ("adam", False),
    ]
    plan = plan_of(*SEARCH, "optimizer=sgd+nesterov,adam", "--", "--epochs", "1")
    assert [c.nesterov for c in plan.corners()] == [True, False]


def test_a_grid_given_twice_is_one_grid(tmp_path):
    found = configs("--grid", "seed=0,1", "--jobs", "2", "--grid", "learning_rate=0.1,0.2")
    assert {(c.seed, c.learning_rate) for c in found} == {(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)}
    file = tmp_path / "own.toml"
    file.write_text("[train]\n[sweep.grid]\nseed = [4, 5]\n")
    assert [c.seed for c in configs("--config", str(file), "--grid", "seed=9")] == [9]


ETAS = ["etas=0.4,1.1"], ["etas=0.5,1.2", "step_sizes=1e-6,9"]
RPROP = ["--", "--optimizer", "torch:Rprop"]


def test_a_value_with_commas_is_in_brackets_or_a_list_of_a_file(tmp_path):
    typed = "optimizer_arguments=[etas=0.4,1.1],[etas=0.5,1.2 step_sizes=1e-6,9]"
    found = configs("--grid", typed, "seed=0,1", *RPROP)
    assert [c.optimizer_arguments for c in found] == [tuple(e) for e in ETAS for _ in range(2)]
    file = tmp_path / "own.toml"
    file.write_text(
        f"[train]\n[sweep.grid]\noptimizer_arguments = {json.dumps(ETAS)}\nseed = [0, 1]\n"
    )
    assert configs("--config", str(file), *RPROP) == found
    plan = plan_of(*SEARCH, typed, *RPROP)
    assert [c.optimizer_arguments for c in plan.corners()] == [tuple(e) for e in ETAS]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[ab]*,head", ["[ab]*", "head"]),  # a pattern
        ("[[ab]]", ["[ab]"]),
        ("[a[0],b],c", ["a[0],b", "c"]),
        ("a[0,b", ["a[0", "b"]),
        ("a],b", ["a]", "b"]),
        ("[],x", ["", "x"]),
        ("", [""]),
    ],
)
def test_brackets_are_quotes_only_around_a_value(text, values):
    assert split_values(text, "--grid", "agree_exclude") == values


@given(st.lists(st.text("a[],= "), min_size=1, max_size=4))
def test_values_of_a_file_are_read_as_they_are(values):
    balanced = [v for v in values if _are_closed(v)] or ["a"]
    text = ",".join(map(quoted_value, balanced))
    assert split_values(text, "--grid", "agree_exclude") == balanced


def _are_closed(text):
    depth = 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--grid", "optimizer_arguments=etas=0.4,1.1", *RPROP], "=[etas=0.4,1.1]."),
        (["--grid", "agree_exclude=[a,b"], "--grid agree_exclude: expected a closing bracket"),
        (["--grid", "betas=0.9 0.99,0.5 0.9"], "--grid: --betas: it would change nothing"),
        (["--grid", "seed=0", "--", "--lr-step", "3"], "--lr-step: it would change nothing"),
        (["--grid", "seed=0,1", "--", "--seed", "3"], "--seed: --grid sets it"),
        (["--grid", "nesterov=true,false", "--", "--no-nesterov"], "--nesterov: --grid sets"),
        (["--grid", "seed=0", "--sampler-seed", "0"], "--sampler-seed"),
        (["--grid", "optimizer=sgd,sgd+nesterov", "nesterov=true,false"], "contradict each other"),
        (["--grid", "seed=0", "--grid", "seed=1"], "seed is given twice"),
        ([*SEARCH, "train_split=0.5:500"], "fractions below 1, or whole numbers"),
        ([*SEARCH, "val_split=100.5:500"], "fractions below 1, or whole numbers"),
        (["--grid", "model=mlp_8,mlq_8"], "one of the trainings is refused: --model"),
        (["--grid", "seed=0", "--", "--data", "cifar10", "--data-dir", "nowhere"], "cifar"),
        (["--grid", "val_split=0.2,5000"], "one of the trainings is refused: --train-split"),
    ],
)
def test_what_does_nothing_or_cannot_be_trained_is_refused(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("sweep", *options)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_what_is_used_in_one_training_is_none_too_many():
    assert len(configs("--grid", "optimizer=sgd,adam", "--", "--betas", "0.9", "0.95")) == 2
    assert len(configs("--grid", "schedule=constant,step", "lr_step=2,3")) == 4
    assert len(configs("--grid", "seed=0,1", "--", "--no-centered")) == 2


@pytest.mark.parametrize("name", ["train_split", "val_split"])
def test_a_range_over_a_split_is_of_samples_or_of_fractions(name):
    (axis,) = plan_of(*SEARCH, f"{name}=100:500").axes
    assert isinstance(axis.distribution, IntDistribution)
    found = axis.value(314)
    assert (found, type(found)) == (314.0, float)
    (axis,) = plan_of(*SEARCH, f"{name}=0.1:0.5").axes
    assert axis.value(0.314159265) == 0.314159


def test_a_file_as_a_value_is_written_as_text():
    plan = plan_of("--grid", "noise_file=a,b", "--", "--data", "cifar100n-fine")
    assert [plan.config_of(p).noise_file for p in plan.points] == [Path("a"), Path("b")]
    assert json.loads(json.dumps(plan.definition()))["grid"]["noise_file"]["choices"] == ["a", "b"]
    with_trial = rows_of(plan, [_trial(noise_file="a")])
    assert json.loads(json.dumps(with_trial))[0]["noise_file"] == "a"


def _trial(**params):
    return create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions={name: CategoricalDistribution(["a", "b"]) for name in params},
    )


def test_a_study_from_before_a_setting_existed_can_be_joined(tmp_path):
    options = ["--grid", "seed=0", "--", "--save-dir", str(tmp_path)]
    plan = plan_of(*options)
    with joined_study(plan, None, 30) as queue:
        older = plan.definition()
        del older["settings"]["ema"], older["settings"]["label_smoothing"]
        queue.study.set_user_attr(KEY, older)
    with joined_study(plan, None, 30):
        pass
    other = plan_of(*options, "--ema", "0.9")
    with pytest.raises(UsageError, match="with another ema"), joined_study(other, None, 30):
        pass


def test_all_who_join_have_the_heartbeat_of_the_first(tmp_path):
    options = ["--grid", "seed=0", "--", "--save-dir", str(tmp_path)]
    plan = plan_of(*options)
    with joined_study(plan, None, 7) as queue:
        assert queue.heartbeat == 7 == queue.study.user_attrs[HEARTBEAT]
    with joined_study(plan, None, 30) as queue:
        assert queue.heartbeat == 7
        assert queue.storage.rdb.get_heartbeat_interval() == 7  # twice this and it is stale
    shared = ["--epochs", "0.1", "--model", "mlp_2"]
    plan = plan_of(*options, *shared, "--name", "told")
    with joined_study(plan, None, 7):
        pass
    _, out, _ = command("sweep", *options, *shared, "--name", "told")
    assert "--heartbeat 7 is used" in out


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("agree=0.9,x", "--agree: expected a number or None, found 'x'."),
        ("batch_size=80,x", "--batch-size: expected a whole number or None, found 'x'."),
        ("seed=0,1.5", "--seed: expected a whole number, found '1.5'."),
        ("momentum=y", "--momentum: expected a number or None, found 'y'."),
        ("betas=0.9 z", "--betas: expected numbers, found '0.9', 'z'."),
        ("save_checkpoint=1 z", "--save-checkpoint: expected numbers, found '1', 'z'."),
    ],
)
def test_a_value_that_cannot_be_read_is_told_what_was_expected(axis, said):
    with pytest.raises(UsageError) as refusal:
        plan_of("--grid", axis)
    assert said in str(refusal.value) and "type" not in str(refusal.value)


def test_fresh_trainings_of_a_sweep_are_not_told_that_they_are_none_to_go_on_with(tmp_path):
    shared = ["--epochs", "0.1", "--model", "mlp_2", "--save-dir", str(tmp_path)]
    assert command("sweep", "--grid", "seed=0", "--", *shared)[::2] == (0, "")
    _, _, err = command("train", *shared, "--resume")
    assert "yet, a new one starts" in err
