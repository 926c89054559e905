"""Workers as processes: one is killed during a training, or all are interrupted."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from optuna.trial import TrialState

from gradfilter.lab._cli import main
from gradfilter.lab.sweep._join import joined_study
from gradfilter.lab.sweep._plan import key_of
from gradfilter.lab.sweep._sweep_command import parse_sweep
from gradfilter.lab.sweep._workers import device_of
from gradfilter.lab.train._run_place import place_of
from gradfilter.lab.train._train import train

OPTIONS = [
    *("--grid", "seed=0,1,2", "--heartbeat", "1"),
    *("--", "--epochs", "30", "--model", "mlp_8", "--label-noise", "0.3"),
]
PATIENCE = 250  # seconds
MEASURED_TIME = {"seconds", "samples_per_second", "peak_memory"}


def started(folder, *options):
    own, shared = OPTIONS[: OPTIONS.index("--")], OPTIONS[OPTIONS.index("--") :]
    call = [sys.executable, "-m", "gradfilter", "sweep", *own, *options, *shared]
    return subprocess.Popen(
        [*call, "--save-dir", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def plan_in(folder):
    return parse_sweep([*OPTIONS, "--save-dir", str(folder)])[1]


def trials_in(folder):
    with joined_study(plan_in(folder), None, 1) as queue:
        return queue.study.get_trials()


def at_work(folder):
    """The run directories of trainings that are well under way."""
    runs = [path.parent for path in folder.rglob("metrics.jsonl")]
    return [
        run
        for run in runs
        if len((run / "metrics.jsonl").read_text().splitlines()) > 3
        and '"running"' in (run / "config.json").read_text()
    ]


def owner(folder, run):
    """The process that trains there."""
    plan = plan_in(folder)
    (trial,) = [t for t in trials_in(folder) if place_of(plan.config_of(t.params)) == run]
    return int(trial.user_attrs["worker"].split("-")[-2])


def until(condition, *processes):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert all(process.poll() is None for process in processes), processes[0].stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def evaluations(config):
    """Those of a finished run, by step, without what depends on the machine's mood."""
    lines = map(json.loads, (place_of(config) / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: {name: line[name] for name in line if name not in MEASURED_TIME}
        for line in lines
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The evaluations of the same trainings, each by itself and undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    plan = plan_in(folder)
    found = {}
    for point in plan.points:
        config = replace(plan.config_of(point), name="")
        with contextlib.redirect_stdout(io.StringIO()):
            assert train(config) == 0
        found[key_of(point)] = evaluations(config)
    return found


def assert_whole(folder, alone):
    """Every training was done once, and as if it had been alone."""
    plan = plan_in(folder)
    trials = trials_in(folder)
    complete = {key_of(t.params): t for t in trials if t.state == TrialState.COMPLETE}
    assert sorted(complete) == sorted(alone)
    assert sum(t.state == TrialState.COMPLETE for t in trials) == len(alone)
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    for point in plan.points:
        config = plan.config_of(point)
        record = json.loads((place_of(config) / "config.json").read_text())
        assert record["status"] == "finished"
        assert evaluations(config) == alone[key_of(point)]
        last = alone[key_of(point)][record["total_steps"]]
        assert complete[key_of(point)].value == last["test_accuracy"]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_by_the_other(tmp_path, alone):
    workers = [started(tmp_path), started(tmp_path)]
    until(lambda: at_work(tmp_path), *workers)
    killed = owner(tmp_path, at_work(tmp_path)[0])
    victim, other = sorted(workers, key=lambda worker: worker.pid != killed)
    victim.kill()
    victim.communicate()
    out, _ = other.communicate(timeout=PATIENCE)
    assert (victim.pid, other.returncode) == (killed, 0), out
    assert "wrote" in out and "trainings are left" not in out
    assert_whole(tmp_path, alone)


@pytest.mark.slow
def test_ctrl_c_puts_everything_back_and_the_same_command_goes_on(tmp_path, alone):
    command = started(tmp_path, "--jobs", "2")
    until(lambda: at_work(tmp_path), command)
    command.send_signal(signal.SIGINT)
    out, _ = command.communicate(timeout=PATIENCE)
    assert command.returncode == 130, out
    assert "interrupted" in out
    left = {trial.state for trial in trials_in(tmp_path)}
    assert left <= {TrialState.WAITING, TrialState.COMPLETE}
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("config.json")]
    assert "interrupted" in {run["status"] for run in runs}
    assert "running" not in {run["status"] for run in runs}
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        main(["sweep", *OPTIONS, "--save-dir", str(tmp_path)])
    assert stop.value.code == 0
    assert_whole(tmp_path, alone)
    assert len(trials_in(tmp_path)) == len(alone)  # nothing was given up on the way


def test_workers_have_a_gpu_each_where_there_are_several(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [device_of("cuda", i) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of("cuda:1", 0) == "cuda:1" and device_of("cpu", 1) == "cpu"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert device_of("cuda", 1) == "cuda"
