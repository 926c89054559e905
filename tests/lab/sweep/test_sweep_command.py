"""`gradfilter sweep`: the trainings that it starts, its refusals, and its results."""

import contextlib
import csv
import io
import json
import math

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from _lab import command
from gradfilter.lab._options import presets
from gradfilter.lab.sweep import _queue as _outcome
from gradfilter.lab.sweep._join import joined_study
from gradfilter.lab.sweep._plan import key_of
from gradfilter.lab.sweep._queue import enqueue, measured
from gradfilter.lab.sweep._sweep_command import parse_sweep
from gradfilter.lab.sweep._workers import work
from gradfilter.lab.train._run_place import place_of
from gradfilter.lab.train._train import train

SHARED = ["--", "--epochs", "2", "--model", "mlp_8", "--val-split", "0.2"]


def rows(folder):
    with (folder / "sweep" / "study.csv").open() as file:
        return list(csv.DictReader(file))


def plan_of(*options):
    return parse_sweep(options)[1]


# What a study is made of


def test_a_grid_has_every_combination_once():
    plan = plan_of(
        "--grid", "learning-rate=0.01,1e-1", "seed=0,1,2", "nesterov=true,False", *SHARED
    )
    settings = [plan.config_of(point) for point in plan.points]
    found = {(c.learning_rate, c.seed, c.nesterov) for c in settings}
    wanted = {(lr, seed, n) for lr in (0.01, 0.1) for seed in (0, 1, 2) for n in (True, False)}
    assert found == wanted and len(settings) == len(wanted) == plan.trials
    assert {c.epochs for c in settings} == {2.0}


def test_values_are_what_train_reads():
    plan = plan_of(
        "--grid",
        "betas=0.9 0.99,0.5 0.9",
        "steps=None,7",
        "agc_exclude=,head.* conv.*",
        "agc=None,1",
        *("--", "--optimizer", "adam"),
    )
    found = {(c.betas, c.steps, c.agc_exclude, c.agc) for c in map(plan.config_of, plan.points)}
    assert len(found) == 16
    assert ((0.5, 0.9), 7, ("head.*", "conv.*"), 1.0) in found
    assert ((0.9, 0.99), None, (), None) in found


def test_a_preset_may_hold_the_grid(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        "[train]\nepochs = 3.0\noptimizer = 'adam'\n[sweep]\nheartbeat = 7\n"
        "[sweep.grid]\nbetas = [[0.9, 0.99], [0.5, 0.9]]\nseed = [4, 5]\n"
    )
    config, plan = parse_sweep(["--config", str(file)])
    assert (config.heartbeat, plan.trials, plan.base.epochs) == (7, 4, 3.0)
    _, plan = parse_sweep(["--config", str(file), "--grid", "seed=9", "--", "--epochs", "1"])
    assert (plan.trials, plan.base.epochs) == (1, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, f in presets().items() if "[sweep" in f.read_text()])
def test_every_published_grid_can_be_trained(name):
    plan = plan_of("--preset", name)
    assert plan.trials == len(plan.points) > 1


@given(st.integers(0, 2**31), st.floats(-3, 0), st.floats(0.01, 3))
@settings(max_examples=5)
def test_a_sampled_value_lies_in_its_range_and_names_one_directory(seed, low, width):
    low, high = 10**low, 10 ** (low + width)
    plan = plan_of(
        *("--sample", f"learning_rate=log:{low}:{high}", "batch_size=8:64", "optimizer=sgd,adam"),
        *("--sampler-seed", str(seed), *SHARED),
    )
    by_name = {axis.name: axis for axis in plan.axes}
    chosen = low * (high / low) ** ((seed % 1000) / 1000)
    value = by_name["learning_rate"].value(chosen)
    assert math.isclose(value, chosen, rel_tol=1e-5)
    a, b = (
        plan.config_of({"learning_rate": c, "batch_size": 8, "optimizer": "sgd"})
        for c in (chosen, chosen * (1 + 1e-12))
    )
    assert (place_of(a) == place_of(b)) == (a == b)
    assert by_name["learning_rate"].distribution.log
    assert by_name["batch_size"].distribution.high == 64
    assert by_name["optimizer"].distribution.choices == ("sgd", "adam")


def test_keys_do_not_depend_on_the_order():
    assert key_of({"a": 1, "b": None}) == key_of({"b": None, "a": 1}) != key_of({"a": 1, "b": 0})


def test_the_metric_is_validation_where_there_is_one():
    assert plan_of("--grid", "seed=0", *SHARED).metric == "val_accuracy"
    assert plan_of("--grid", "seed=0").metric == "test_accuracy"
    assert plan_of("--grid", "seed=0").direction == "maximize"
    assert plan_of("--grid", "seed=0", "--metric", "test_loss").direction == "minimize"
    minimised = plan_of("--grid", "seed=0", "--direction", "minimize")
    assert (minimised.metric, minimised.direction) == ("test_accuracy", "minimize")


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "either --grid or --sample, found neither"),
        (["--grid"], "either --grid or --sample, found neither"),
        (["--grid", "seed=0", "--sample", "momentum=0:0.9"], "found both"),
        (["--grid", "seed"], "expected NAME=VALUE,VALUE"),
        (["--grid", "seed="], "seed has an empty value"),
        (["--grid", "sead=0"], "no setting 'sead'. Did you mean seed?"),
        (["--grid", "seed=0,0"], "value 0 twice"),
        (["--grid", "seed=0", "seed=1"], "seed is given twice"),
        (["--grid", "seed=0,one"], "seed=one"),
        (["--grid", "schedule=cosine,tiger"], "invalid choice 'tiger'"),
        (["--grid", "optimizer=sgd,tiger"], "found 'tiger'"),
        (["--grid", "nesterov=yes"], "expected true or false"),
        (["--grid", "learning_rate=0.1,-1"], "--learning-rate: expected a positive number"),
        (["--grid", "agree=0.9", "microbatches=1,2"], "several rows to compare"),
        (["--grid", "eval_every=1,2"], "Give it after --"),
        (["--grid", "data=folder:a/b,folder:a-b"], "two trainings have the run directory"),
        (["--grid", "seed=0", "--trials", "3"], "--trials"),
        (["--grid", "seed=0", "--jobs", "0"], "--jobs: expected at least 1"),
        (["--grid", "seed=0", "--heartbeat", "0"], "--heartbeat: expected at least 1"),
        (["--grid", "seed=0", "--", "--no-resume"], "--resume: a sweep always resumes"),
        (["--grid", "seed=0", "--", "--no_resume"], "--resume: a sweep always resumes"),
        (["--grid", "seed=0", "--metric", "speed"], "--metric: expected one of"),
        (["--grid", "seed=0", "--metric", "val_loss"], "no validation split"),
        (["--grid", "seed=0", "--epochs", "3"], "after a lone --"),
        (["--grid", "seed=0", "--", "--epochz", "3"], "--epochz"),
        (["--grid", "seed=0", "--", "--device", "abacus"], "--device"),
        (["--grid", "seed=0", "--", "--print-config"], "--print-config"),
        (["--sample", "learning_rate=0.1:1"], "would optimise the test accuracy"),
        (["--sample", "momentum=0.9:0.5", *SHARED], "LOW below HIGH"),
        (["--sample", "momentum=0.5:1.5", *SHARED], "--momentum"),
        (["--sample", "learning_rate=log:0:1", *SHARED], "LOW above 0"),
        (["--sample", "learning_rate=1:2:3", *SHARED], "learning_rate=LOW:HIGH"),
        (["--sample", "learning_rate=0.1:1", "--trials", "0", *SHARED], "--trials"),
        (["--grid", "seed=0", "--storage", "nonsense://x"], "--storage"),
        (["--grid", "seed=0", "--storage", "sqlite://"], "lost when the process ends"),
        (["--grid", "seed=0", "--storage", "/dev/null/study.db"], "--storage"),
        (["--preset", "nope"], "--preset: expected one of"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("sweep", *options)
    assert (code, out) == (2, "")
    assert err.startswith("gradfilter sweep: ") and err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_storage_that_is_none_is_one_line_without_the_password(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but long enough to look like none at all")
    code, _, err = command("sweep", "--grid", "seed=0", "--storage", tmp_path / "study.db")
    assert code == 2 and "not a database" in err and err.count("\n") == 1
    url = "postgresql://someone:hidden@localhost:1/x"
    code, _, err = command("sweep", "--grid", "seed=0", "--storage", url)
    assert code == 2 and "someone" in err and "hidden" not in err and err.count("\n") == 1


# What comes of a study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two learning rates and two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    options = ["--grid", "learning_rate=0.01,0.1", "seed=0,1", *SHARED, "--save-dir", folder]
    code, out, err = command("sweep", *options)
    assert (code, err) == (0, "")
    return folder, options, out


def test_every_training_is_there_with_its_numbers(finished, tmp_path):
    folder, options, out = finished
    found = rows(folder)
    assert [row["state"] for row in found] == ["complete"] * 4
    plan = plan_of(*map(str, options))
    for row, point in zip(found, plan.points, strict=True):
        config = plan.config_of(point)
        assert (float(row["learning_rate"]), int(row["seed"])) == (
            config.learning_rate,
            config.seed,
        )
        run = folder / row["run"]
        assert run == place_of(config)
        assert json.loads((run / "config.json").read_text())["status"] == "finished"
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert float(row["value"]) == float(row["val_accuracy"]) == last["val_accuracy"]
        assert float(row["test_loss"]) == last["test_loss"]
    written = json.loads((folder / "sweep" / "study.json").read_text())
    assert written["metric"] == "val_accuracy" and len(written["trials"]) == 4
    assert "±" in out and out.index(" 0.1 ") < out.index(" 0.01 ")  # the better one first


def test_the_same_command_again_trains_nothing(finished):
    folder, options, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    code, out, _ = command("sweep", *options)
    assert code == 0 and "trial " not in out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--grid", "learning_rate=0.01,0.1", "seed=0,1,2", *SHARED], "another --grid"),
        (["--grid", "learning_rate=0.01,0.1", "seed=0,1", *SHARED, "--epochs", "3"], "epochs"),
        (
            ["--metric", "test_loss", "--grid", "learning_rate=0.01,0.1", "seed=0,1", *SHARED],
            "--direction, --metric",
        ),
    ],
)
def test_another_study_of_that_name_is_refused(finished, options, said):
    folder, _, _ = finished
    before = (folder / "sweep" / "study.csv").read_bytes()
    code, out, err = command("sweep", *options, "--save-dir", folder)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert (folder / "sweep" / "study.csv").read_bytes() == before


def test_a_training_that_fails_is_told_and_the_study_goes_on(tmp_path):
    shared = [*SHARED[:-2], "--save-dir", tmp_path]
    options = ["--grid", "batch_size=80,81", "seed=0,1", *shared, "--microbatches", "2"]
    code, out, _ = command("sweep", *options)
    assert code == 1
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 2 + ["failed"] * 2
    assert "a multiple of --microbatches 2" in rows(tmp_path)[2]["reason"]
    assert "2 failed; --retry-failed" in out
    code, out, _ = command("sweep", *options)  # it is not tried again by itself
    assert code == 1 and "trial " not in out
    code, out, _ = command("sweep", "--retry-failed", *options)
    assert code == 1 and out.count("trial ") == 2
    assert sorted(row["state"] for row in rows(tmp_path)) == ["complete"] * 2 + ["failed"] * 2


def test_whatever_a_training_raises_is_recorded(tmp_path, monkeypatch):
    def break_down(config):
        raise RuntimeError("the sky fell\non us") if config.seed == 1 else KeyError()

    monkeypatch.setattr(_outcome, "train", break_down)
    code, _, _ = command("sweep", "--grid", "seed=0,1", *SHARED, "--save-dir", tmp_path)
    assert code == 1
    assert [r["reason"] for r in rows(tmp_path)] == ["KeyError", "RuntimeError: the sky fell"]


@pytest.mark.slow
def test_a_training_that_diverges_is_recorded_and_not_tried_again(tmp_path):
    options = ["--grid", "learning_rate=0.1,1e30", *SHARED, "--save-dir", tmp_path]
    code, out, _ = command("sweep", *options)
    assert code == 0
    assert [row["state"] for row in rows(tmp_path)] == ["complete", "diverged"]
    assert "not a number" in rows(tmp_path)[1]["reason"] and rows(tmp_path)[1]["value"] == ""
    assert "diverged: learning_rate=1e+30" in out
    code, out, _ = command("sweep", "--retry-failed", *options)
    assert code == 0 and "trial " not in out


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_and_can_be_made_longer(tmp_path):
    options = ["--sample", "learning_rate=log:1e-3:1", "momentum=0:0.9"]
    shared = [*SHARED, "--epochs", "1", "--save-dir"]
    for folder, lengths in ((tmp_path / "a", (2, 4)), (tmp_path / "b", (4,))):
        for trials in lengths:
            code, _, err = command("sweep", *options, "--trials", trials, *shared, folder)
            assert (code, err) == (0, "")
            assert len(rows(folder)) == trials
    chosen = [
        [(r["learning_rate"], r["momentum"], r["value"]) for r in rows(f)]
        for f in (tmp_path / "a", tmp_path / "b")
    ]
    assert chosen[0] == chosen[1]  # the search follows from the history
    assert len({lr for lr, _, _ in chosen[0]}) == 4


@pytest.mark.slow
def test_a_run_at_work_elsewhere_is_left_alone_and_waited_for(tmp_path):
    options = ["--grid", "seed=0,1,2", "--heartbeat", 1, *SHARED, "--save-dir", tmp_path]
    plan = plan_of(*map(str, options))
    config = plan.config_of(plan.points[0])
    place = place_of(config)
    place.mkdir(parents=True)
    lock = FileLock(place / "run.lock")
    lock.acquire()
    said = []

    def let_go(line):
        said.append(line)
        if line.startswith("waiting"):
            lock.release()

    with joined_study(plan, None, 1) as queue:
        enqueue(queue, retry_failed=False)
        assert work(queue, let_go)
        states = [trial.state for trial in queue.trials()]
    assert [line.split(":")[0] for line in said] == [
        "trial 1",
        "trial 2",
        "waiting for 1 trainings of other workers",
        "trial 0",
    ]
    assert states == [TrialState.COMPLETE] * 3


# What an evaluation says


def line(step, **numbers):
    return {"step": step, "train_loss": 0.5, "val_accuracy": 0.5, "val_loss": 1.0, **numbers}


@pytest.mark.parametrize(
    ("options", "lines", "value"),
    [
        ([], [line(0, val_accuracy=0.9), line(1, val_accuracy=0.4)], 0.4),
        (["--evaluation", "best"], [line(0, val_accuracy=0.9), line(1, val_accuracy=0.4)], 0.9),
        (
            ["--evaluation", "best", "--metric", "val_loss"],
            [line(0, val_loss=None), line(1, val_loss=2.0), line(2, val_loss=3.0)],
            2.0,
        ),
        (["--metric", "val_loss"], [line(0), line(1, val_loss=None)], None),
        ([], [line(0), line(1, train_loss=None)], None),
        (["--metric", "memorised"], [line(0, memorised=None)], None),
    ],
)
def test_the_evaluation_that_counts(options, lines, value):
    found = measured(plan_of("--grid", "seed=0", *options, *SHARED), lines, "run")
    assert found.value == value
    assert found.state == (TrialState.PRUNED if value is None else TrialState.COMPLETE)
    assert (found.reason is None) == (value is not None)


def test_a_run_without_evaluations_fails():
    assert measured(plan_of("--grid", "seed=0"), [], "run").state == TrialState.FAIL


def test_a_finished_run_is_not_trained_again(tmp_path):
    options = ["--grid", "seed=0", *SHARED, "--save-dir", str(tmp_path)]
    plan = plan_of(*options)
    config = plan.config_of(plan.points[0])
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    before = (place_of(config) / "metrics.jsonl").read_bytes()
    assert command("sweep", *options)[0] == 0
    assert (place_of(config) / "metrics.jsonl").read_bytes() == before
    assert rows(tmp_path)[0]["state"] == "complete"
