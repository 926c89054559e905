"""A sweep during faults of a worker, the machine or the database."""

import os
import sys

import pytest
import sqlalchemy
import torch
from optuna.trial import TrialState, create_trial

from _lab import command
from _sweep import states, studies_in
from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep import _queue as _outcome
from gradfilter.lab.sweep import _storage
from gradfilter.lab.sweep import _workers as _jobs
from gradfilter.lab.sweep import _workers as _worker
from gradfilter.lab.sweep._queue import Outcome, claim, finish, requeue
from gradfilter.lab.sweep._sweep_command import groups_of, parse_sweep
from gradfilter.lab.sweep._workers import run_workers, work
from gradfilter.lab.train._run_place import place_of

SMALL = ["--", "--epochs", "0.1", "--model", "mlp_2"]
GRID = ["--grid", "seed=0,1,2", *SMALL]
SEARCH = [*("--sample", "learning_rate=0.01:0.1", "--trials", "3", "--metric", "test_accuracy")]
# Until a file is there. argv: its path.
WORKER = """
import os, stat, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
sys.exit(3 - 3 * stat.S_ISFIFO(os.fstat(0)[0]))
"""
DONE = Outcome(TrialState.COMPLETE, 0.5, "run")


@pytest.fixture
def begun(tmp_path):
    with studies_in(tmp_path) as begin:
        yield begin


def measured_as(value):
    """In place of a training and its evaluations."""
    return lambda plan, config: Outcome(TrialState.COMPLETE, value, str(place_of(config)))


# Who trains what


def test_a_search_samples_another_while_one_is_at_work_elsewhere(begun):
    queue = begun(*SEARCH, *SMALL)
    first = claim(queue, "a")
    requeue(queue, first.number, "a")
    second = claim(queue, "b", avoid={first.number})
    assert second.number != first.number and second.params != first.params
    assert queue.plan.axes[0].distribution == second.distributions["learning_rate"]
    third = claim(queue, "b", avoid={first.number})
    assert third.number not in (first.number, second.number)
    assert claim(queue, "b", avoid={first.number}) is None
    assert claim(queue, "c").number == first.number


@pytest.mark.slow
def test_a_search_with_a_busy_run_trains_the_others_first(begun, monkeypatch):
    queue = begun(*SEARCH, *SMALL)
    trial = claim(queue, "a")
    requeue(queue, trial.number, "a")
    busy = place_of(queue.plan.config_of(trial.params))
    said = []

    def outcome(plan, config):
        if place_of(config) == busy and not any("waiting" in line for line in said):
            return _outcome.Unfinished.BUSY
        return measured_as(0.5)(plan, config)

    monkeypatch.setattr(_worker, "outcome_of", outcome)
    assert work(queue, said.append)
    assert [line.split(":")[0] for line in said] == [
        "trial 1",
        "trial 2",
        "waiting for 1 trainings of other workers",
        "trial 0",
    ]


def test_a_kill_between_the_reason_and_its_state_is_no_failure(begun, monkeypatch):
    queue = begun(*GRID)
    first = claim(queue, "killed")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(queue.study, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(queue, first.number, "killed", Outcome(TrialState.PRUNED, None, "run", "why"))
    with queue.storage.rdb.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2001-01-01 00:00:00'")
        )
    taken = []
    while (trial := claim(queue, "other")) is not None:
        assert finish(queue, trial.number, "other", DONE)
        taken.append(trial.params["seed"])
    assert sorted(taken) == [0, 1, 2] and states(queue) == [TrialState.COMPLETE] * 3


def test_a_trial_put_back_has_no_reason(begun, monkeypatch):
    queue = begun(*GRID)
    number = claim(queue, "a").number
    queue.storage.rdb.set_trial_user_attr(queue.trial_id(number), "reason", "half told")
    requeue(queue, number, "a")
    assert queue.trials()[number].user_attrs["reason"] is None


def test_a_trial_that_another_took_is_not_told_as_done(begun, monkeypatch):
    queue = begun("--grid", "seed=0", *SMALL)
    said = []

    def taken_meanwhile(plan, config):
        if not said:
            (trial,) = queue.trials()
            queue.storage.rdb.set_trial_user_attr(queue.trial_id(trial.number), "worker", "b")
            said.append("taken")
        return measured_as(0.25)(plan, config)

    def look(line):
        said.append(line)
        if line.startswith("waiting"):
            assert finish(queue, 0, "b", DONE)

    monkeypatch.setattr(_worker, "outcome_of", taken_meanwhile)
    assert work(queue, look)
    assert "taken over by another worker" in said[1] and not any("0.25" in x for x in said)


def test_a_run_that_was_proposed_twice_counts_once():
    _, plan = parse_sweep([*SEARCH, *SMALL])
    trials = [
        create_trial(
            state=TrialState.COMPLETE,
            value=value,
            params={"learning_rate": rate},
            distributions={"learning_rate": plan.axes[0].distribution},
            user_attrs={"run": f"run {rate}", "evaluation": {"test_accuracy": value}},
        )
        for rate, value in ((0.05, 0.5), (0.05, 0.5), (0.02, 0.75))
    ]
    groups = groups_of(plan, trials)
    assert [(g.values, g.tested, g.trainings) for g in groups] == [
        ((0.75,), (0.75,), 1),
        ((0.5,), (0.5,), 1),
    ]


# A machine that cannot train


@pytest.mark.parametrize(
    "fault", [OSError(5, "Input/output error"), torch.OutOfMemoryError("no room"), MemoryError()]
)
def test_a_faulty_machine_ends_its_worker_and_no_training(begun, monkeypatch, fault):
    queue = begun(*GRID)

    def break_down(config):
        raise fault

    monkeypatch.setattr(_outcome, "train", break_down)
    with pytest.raises(UsageError, match=f"{type(fault).__name__}.*waits for another") as raised:
        work(queue, print)
    assert "\n" not in str(raised.value)
    assert states(queue) == [TrialState.WAITING] * 3


def test_a_run_that_cannot_be_written_is_not_a_failed_training(begun):
    queue = begun(*GRID)
    place = place_of(queue.plan.base)
    place.parent.parent.mkdir(parents=True)
    place.parent.touch()  # where directories are to be made
    with pytest.raises(UsageError, match="cannot write to"):
        work(queue, print)
    assert states(queue) == [TrialState.WAITING] * 3


def test_data_that_is_gone_is_not_a_failed_training(begun, monkeypatch):
    queue = begun(*GRID)

    def gone(*_):
        raise UsageError("no data set here.")

    monkeypatch.setattr(_outcome, "train", gone)
    monkeypatch.setattr(_outcome, "data_of", gone)
    with pytest.raises(UsageError, match=r"no data set here\. The training waits"):
        work(queue, print)
    assert states(queue) == [TrialState.WAITING] * 3


# The database


def test_the_parent_bears_a_database_that_is_away_for_a_moment(
    begun, tmp_path, monkeypatch, capsys
):
    queue, asked = begun(*GRID), []

    def closed(queue):
        asked.append(queue)
        if len(asked) == 2:
            raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("away"))
        if len(asked) == 3:
            (tmp_path / "enough").touch()
        return []

    monkeypatch.setattr(_jobs, "_closed", closed)
    monkeypatch.setattr(_jobs, "JOB_POLL", 0.05)
    worker = (sys.executable, "-S", "-c", WORKER, str(tmp_path / "enough"))
    monkeypatch.setattr(_jobs, "COMMAND", worker)
    assert run_workers(queue, [], 1, tmp_path / "workers")
    assert len(asked) > 2
    assert "ended with exit code" not in capsys.readouterr().err  # it is told when this one ends


def test_connections_to_a_server_are_tried_before_they_are_used(monkeypatch):
    given = {}
    monkeypatch.setattr(_storage, "RDBStorage", lambda *_, **options: given.update(options))
    _storage._rdb(sqlalchemy.make_url("postgresql://someone@host/name"), 30)
    assert given["engine_kwargs"] == {"pool_pre_ping": True}


def test_missing_data_is_said_before_a_study_is_begun(tmp_path):
    code, out, err = command(
        *("sweep", "--grid", "seed=0,1", "--storage", tmp_path / "study.db"),
        *("--", "--data", f"folder:{tmp_path / 'none'}", "--save-dir", tmp_path / "runs"),
    )
    assert (code, out) == (2, "") and err.count("\n") == 1 and "none" in err
    assert os.listdir(tmp_path) == []
