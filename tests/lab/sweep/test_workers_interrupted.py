"""Ctrl-C in a sweep, at any time."""

import signal

import pytest
from filelock import FileLock
from optuna.trial import TrialState

from _lab import command
from _sweep import states, studies_in
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab.sweep import _workers as _worker
from gradfilter.lab.sweep._queue import Outcome, Unfinished, claim, count_unfinished
from gradfilter.lab.sweep._workers import work
from gradfilter.lab.train._run_place import place_of

SMALL = ["--", "--epochs", "0.1", "--model", "mlp_2"]
GRID = ["--grid", "seed=0,1,2", *SMALL]


@pytest.fixture
def begun(tmp_path):
    with studies_in(tmp_path) as begin:
        yield begin


def test_ctrl_c_at_the_last_evaluation_starts_no_other_training(begun, monkeypatch):
    queue, trained = begun(*GRID), []

    def last_evaluation(plan, config):
        with interruptible():  # which train asks before every step
            trained.append(config.seed)
            signal.raise_signal(signal.SIGINT)
        return Outcome(TrialState.COMPLETE, 0.5, str(place_of(config)))

    monkeypatch.setattr(_worker, "outcome_of", last_evaluation)
    before = signal.getsignal(signal.SIGINT)
    assert not work(queue, print)
    assert trained == [0]
    assert states(queue) == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_polite_kill_of_a_sweep_puts_back_what_it_trains(tmp_path, monkeypatch):
    def asked(plan, config):
        signal.raise_signal(signal.SIGTERM)
        return Unfinished.INTERRUPTED

    monkeypatch.setattr(_worker, "outcome_of", asked)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, out, err = command("sweep", *GRID, "--save-dir", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143, err
    assert "interrupted; 3 trainings are left; the same command continues" in out


def test_ctrl_c_between_two_trainings_puts_back_what_was_taken(begun, monkeypatch):
    queue = begun(*GRID)

    def interrupted(*args):
        trial = claim(*args)
        signal.raise_signal(signal.SIGINT)
        return trial

    monkeypatch.setattr(_worker, "claim", interrupted)
    monkeypatch.setattr(_worker, "outcome_of", lambda *_: pytest.fail("it was trained"))
    assert not work(queue, print)
    assert states(queue) == [TrialState.WAITING] * 3 and count_unfinished(queue) == 3


def test_ctrl_c_ends_the_wait_for_others(begun, monkeypatch):
    queue = begun("--grid", "seed=0", *SMALL)
    lock = place_of(queue.plan.base)
    lock.mkdir(parents=True)
    # Longer than a test may take.
    monkeypatch.setattr(_worker, "QUEUE_POLL", 3600.0)
    queue.storage.rdb.heartbeat_interval = 3600
    with FileLock(lock / "run.lock"):
        assert not work(queue, lambda line: signal.raise_signal(signal.SIGINT))
