"""A sweep without a terminal: one plain line per training, as soon as the training ends."""

import subprocess
import sys

import pytest
from optuna.trial import TrialState
from rich.console import Console
from test_sweep_faults import WORKER

from _lab import command
from _sweep import studies_in
from gradfilter.lab.sweep import _workers
from gradfilter.lab.sweep._queue import Outcome, claim, finish
from gradfilter.lab.sweep._workers import run_workers

SHARED = ("--", "--steps", "2", "--model", "mlp_4", "--save-dir")
LONGER = ("--", "--steps", "300", "--model", "mlp_4", "--save-dir")
SEEDS = ("--grid", "seed=0,1")


def plain(text):
    return all(line.isprintable() for line in text.splitlines())


def test_one_job_says_how_many_trainings_and_jobs_and_a_line_each(tmp_path):
    code, out, err = command("sweep", *SEEDS, *SHARED, tmp_path)
    start, first, second, *_ = out.splitlines()
    assert code == 0 and plain(out) and plain(err)
    assert start == f"study 'sweep': 2 trainings in {tmp_path / 'sweep'}, 1 job"
    assert first.startswith("trial 0: seed 0: ") and second.startswith("trial 1: seed 1: ")


@pytest.mark.slow
def test_several_jobs_say_it_while_they_work(tmp_path):
    run = [sys.executable, "-m", "gradfilter", "sweep", "--grid", "seed=0,1,2", "--jobs", "2"]
    # Lines are read in one way only: communicate() does not see what readline() has buffered.
    with (
        (tmp_path / "stderr").open("w+") as errors,
        subprocess.Popen(
            [*run, *LONGER, str(tmp_path)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        start, first = process.stdout.readline(), process.stdout.readline()
        still_training = process.poll() is None
        rest = process.stdout.read()
    err = (tmp_path / "stderr").read_text()
    assert process.returncode == 0, err
    assert start == f"study 'sweep': 3 trainings in {tmp_path / 'sweep'}, 2 jobs\n"
    assert still_training
    told = sorted(line for line in (first + rest).splitlines() if line.startswith("trial "))
    assert [line.partition(": test")[0] for line in told] == [
        f"trial {seed}: seed {seed}" for seed in range(3)
    ]
    assert plain(start + first + rest + err)


@pytest.mark.slow
def test_what_was_done_before_is_not_said_again(tmp_path):
    command("sweep", "--grid", "seed=0", "--name", "s", *SHARED, tmp_path)
    code, out, _ = command(
        "sweep", "--grid", "seed=0", "--name", "s", "--jobs", "2", *SHARED, tmp_path
    )
    assert code == 0 and "trial 0" not in out


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_come_as_trainings_end_but_not_on_a_terminal(tmp_path, monkeypatch, capsys, terminal):
    """Workers are replaced by a process that waits for the end of all trainings."""
    asked, seen = [], []

    def closed(queue):
        asked.append(queue)
        seen.append(capsys.readouterr().out)
        if len(asked) == 3:
            (tmp_path / "enough").touch()
        return queue.trials()[: min(3, len(asked) - 1)]  # one more at every look

    monkeypatch.setattr(_workers, "_closed", closed)
    monkeypatch.setattr(_workers, "JOB_POLL", 0.05)
    monkeypatch.setattr(
        _workers, "COMMAND", (sys.executable, "-S", "-c", WORKER, f"{tmp_path}/enough")
    )
    monkeypatch.setattr(Console, "is_terminal", terminal)
    with studies_in(tmp_path) as begin:
        queue = begin("--grid", "seed=0,1,2", *SHARED[:-1])
        for value in (0.5, None, 0.75):
            trial = claim(queue, "a")
            state = TrialState.PRUNED if value is None else TrialState.COMPLETE
            reason = "diverged\x1b[31m" if value is None else None
            assert finish(queue, trial.number, "a", Outcome(state, value, "run", reason))
        assert run_workers(queue, [], 1, tmp_path / "workers")
    said = [*seen, capsys.readouterr().out]
    if terminal:
        assert "trial" not in "".join(said)
        return
    told = "".join(said).splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        "seed 0: test_accuracy 0.5",
        "seed 1: diverged\\x1b[31m",
        "seed 2: test_accuracy 0.75",
    ]
    assert said[2].startswith("trial 0") and "trial 1" not in said[2]  # not all at the end
