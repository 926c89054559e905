"""The queue of a study, with workers that are killed or that claim at the same moment."""

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from gradfilter.lab.sweep import _queue
from gradfilter.lab.sweep._join import joined_study
from gradfilter.lab.sweep._plan import key_of
from gradfilter.lab.sweep._queue import Outcome, claim, count_unfinished, enqueue, finish, requeue
from gradfilter.lab.sweep._sweep_command import parse_sweep

GRID = ["--grid", "learning_rate=0.01,0.1", "seed=0,1"]
SEARCH = ["--sample", "learning_rate=0.01:0.1", "--trials", "3", "--metric", "test_accuracy"]
DONE = Outcome(TrialState.COMPLETE, 0.5, "run")
DATABASE = os.environ.get("GRADFILTER_TEST_DATABASE")


@pytest.fixture
def begun():
    """Begins or joins studies, and closes them when the test is over."""
    with ExitStack() as stack:

        def begin(folder, *options, storage=None):
            _, plan = parse_sweep([*options, "--", "--save-dir", str(folder)])
            # No test waits until a heartbeat is old: `grow_old` makes it so.
            queue = stack.enter_context(joined_study(plan, storage, 3600))
            enqueue(queue, retry_failed=False)
            return queue

        yield begin


def grow_old(queue, number):
    """As if the worker had been killed a while ago."""
    with queue.storage.rdb.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "UPDATE trial_heartbeats SET heartbeat = '2001-01-01 00:00:00' WHERE trial_id = :id"
            ),
            {"id": queue.trial_id(number)},
        )


def keys(queue, *states):
    return Counter(key_of(t.params) for t in queue.trials() if not states or t.state in states)


def each_once(queue):
    return {key_of(point): 1 for point in queue.plan.points}


def train_everything(queue, worker="anybody"):
    while (trial := claim(queue, worker)) is not None:
        assert finish(queue, trial.number, worker, DONE)
    assert count_unfinished(queue) == 0


def test_a_worker_that_was_killed_loses_its_trial_to_another(begun, tmp_path):
    queue = begun(tmp_path, *GRID)
    first = claim(queue, "killed")
    grow_old(queue, first.number)
    train_everything(queue)
    assert keys(queue, TrialState.COMPLETE) == each_once(queue)
    # It was not dead after all: what it found is not counted twice.
    assert not finish(queue, first.number, "killed", DONE)
    requeue(queue, first.number, "killed")
    assert keys(queue, TrialState.COMPLETE) == each_once(queue) and count_unfinished(queue) == 0


def test_a_worker_that_is_alive_keeps_its_trial(begun, tmp_path):
    queue = begun(tmp_path, *GRID)
    first = claim(queue, "alive")
    others = [claim(queue, "other").number for _ in range(3)]
    assert claim(queue, "other") is None
    assert first.number not in others and count_unfinished(queue) == 4


@pytest.mark.parametrize("options", [GRID, SEARCH])
def test_a_kill_before_the_trial_was_signed(begun, tmp_path, monkeypatch, options):
    queue = begun(tmp_path, *options)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(queue.storage.rdb, "record_heartbeat", killed)
        with suppress(KeyboardInterrupt):
            claim(queue, "killed")
    assert TrialState.RUNNING in [t.state for t in queue.trials()]
    train_everything(queue)
    assert len(queue.trials()) == queue.plan.trials
    assert set(keys(queue, TrialState.COMPLETE).values()) == {1}


def test_a_kill_while_the_grid_was_put_into_the_queue(begun, tmp_path, monkeypatch):
    added = _queue._add

    def add_two(queue, params, **facts):
        if len(queue.study.get_trials()) == 2:
            raise KeyboardInterrupt
        added(queue, params, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(_queue, "_add", add_two)
        with suppress(KeyboardInterrupt):
            begun(tmp_path, *GRID)
    queue = begun(tmp_path, *GRID)
    assert keys(queue) == each_once(queue)


def test_a_kill_between_giving_up_a_trial_and_its_replacement(begun, tmp_path):
    queue = begun(tmp_path, *GRID)
    number = claim(queue, "killed").number
    queue.study.tell(number, state=TrialState.FAIL)
    for _ in range(3):
        enqueue(queue, retry_failed=False)
    assert keys(queue) == each_once(queue)


def test_a_search_takes_up_what_was_sampled(begun, tmp_path):
    queue = begun(tmp_path, *SEARCH)
    first = claim(queue, "killed")
    grow_old(queue, first.number)
    again = claim(queue, "other")
    assert again.params == first.params and again.number != first.number
    assert finish(queue, again.number, "other", DONE)
    train_everything(queue)
    assert len(queue.trials()) == 3


def test_a_kill_in_the_middle_of_sampling(begun, tmp_path):
    queue = begun(tmp_path, *SEARCH, "--sample", "momentum=0:0.9")
    axis = queue.plan.axes[0]
    with pytest.warns(UserWarning, match="Heartbeat"):
        queue.study.ask({axis.name: axis.distribution})
    train_everything(queue)
    assert [set(t.params) for t in queue.trials()] == [{"learning_rate", "momentum"}] * 3


def test_what_is_put_back_is_taken_again(begun, tmp_path):
    queue = begun(tmp_path, *GRID)
    number = claim(queue, "a").number
    requeue(queue, number, "b")  # not its own
    assert count_unfinished(queue) == 4 and claim(queue, "b").number != number
    requeue(queue, number, "a")
    assert claim(queue, "c", avoid={number}).number != number
    assert claim(queue, "c").number == number


ACTIONS = st.tuples(
    st.sampled_from(["claim", "finish", "fail", "put back", "kill", "kill unsigned", "retry"]),
    st.integers(0, 3),
)


@pytest.mark.slow
@given(st.lists(ACTIONS, min_size=8, max_size=20))
# Every example has a study of its own.
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
def test_no_trial_is_lost_or_doubled(begun, tmp_path_factory, actions):
    queue = begun(tmp_path_factory.mktemp("queue"), *GRID)
    owned, complete = [], 0
    for action, choice in actions:
        if action == "claim":
            trial = claim(queue, f"worker {choice}")
            owned += [] if trial is None else [(trial.number, f"worker {choice}")]
        elif action == "retry":
            enqueue(queue, retry_failed=True)
        elif owned:
            # A killed worker stays in the list: it may turn out to be alive.
            number, worker = owned[choice % len(owned)]
            if action == "finish":
                finish(queue, number, worker, DONE)
            elif action == "fail":
                finish(queue, number, worker, Outcome(TrialState.FAIL, None, "run", "why"))
            elif action == "put back":
                requeue(queue, number, worker)
            elif action == "kill":
                grow_old(queue, number)
            else:
                rdb = queue.storage.rdb
                if rdb.get_trial(queue.trial_id(number)).state == TrialState.RUNNING:
                    rdb.set_trial_user_attr(queue.trial_id(number), "worker", None)
        enqueue(queue, retry_failed=False)
        trials = queue.trials()
        assert Counter(key_of(t.params) for t in trials) == each_once(queue)
        before, complete = complete, sum(t.state == TrialState.COMPLETE for t in trials)
        assert complete >= before
    for trial in queue.trials():
        grow_old(queue, trial.number)
    enqueue(queue, retry_failed=True)
    train_everything(queue)
    assert keys(queue, TrialState.COMPLETE) == each_once(queue)


# Several at the same moment

RACER = """
import sys, time
from pathlib import Path
from optuna.trial import TrialState
from gradfilter.lab.sweep._sweep_command import parse_sweep
from gradfilter.lab.sweep._join import joined_study
from gradfilter.lab.sweep._queue import Outcome
from gradfilter.lab.sweep._queue import claim, enqueue, finish
me, folder, storage, *options = sys.argv[1:]
_, plan = parse_sweep([*options, "--", "--save-dir", folder])
Path(folder, me).touch()
while not Path(folder, "go").exists():
    time.sleep(0.001)
with joined_study(plan, storage or None, 30) as queue:
    enqueue(queue, retry_failed=False)
    while (trial := claim(queue, me)) is not None:
        print(trial.number)
        Path(folder, me + "-trains").touch()
        while len([*Path(folder).glob("*-trains")]) < 2:
            time.sleep(0.001)
        evaluated = Outcome(TrialState.COMPLETE, 0.5, "run", None, {plan.metric: 0.5})
        assert finish(queue, trial.number, me, evaluated)
"""


def raced(folder, storage, *options):
    """Return the trials that two workers took which started at the same moment."""
    call = [sys.executable, "-c", RACER]
    racers = [
        subprocess.Popen([*call, me, str(folder), storage, *options], stdout=subprocess.PIPE)
        for me in ("a", "b")
    ]
    while not all((folder / me).exists() for me in ("a", "b")):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (folder / "go").touch()
    said = [racer.communicate(timeout=250)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    return [[int(number) for number in out.split()] for out in said]


@pytest.mark.slow
@pytest.mark.parametrize(
    "server",
    [
        "",
        pytest.param(
            DATABASE,
            marks=pytest.mark.skipif(
                not DATABASE, reason="needs a database: GRADFILTER_TEST_DATABASE=URL"
            ),
        ),
    ],
)
def test_two_that_start_together_share_the_grid(begun, tmp_path, server):
    name = f"race-{time.time_ns()}"  # a server keeps what was there before
    options = ["--name", name, "--grid", f"seed={','.join(map(str, range(16)))}"]
    a, b = raced(tmp_path, server, *options)
    assert sorted(a + b) == list(range(16))
    assert a and b
    queue = begun(tmp_path, *options, storage=server or None)
    assert keys(queue, TrialState.COMPLETE) == each_once(queue)
    assert len(queue.study.get_trials()) == 16
