"""`torchrun -m gradfilter demo`: several processes give the training of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gradfilter.lab._processes import started_processes

OPTIONS = ["--steps", "6", "--dtype", "float64", "--seeds", "2", "--noise", "0.3"]


def launched(processes, *options):
    """The outcome of a demo in one process, or in several started by torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # One thread each: a process cannot know how many others compute at the same time.
    return subprocess.run(
        [sys.executable, *(run if processes > 1 else []), "-m", "gradfilter", "demo", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = launched(1, *OPTIONS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(out):
    """Everything printed, without paths and the last column, seconds as mean ± sd."""
    lines = [line.split()[:-3] for line in out.splitlines() if not line.startswith("wr")]
    assert sum(line[:1] == ["agree"] for line in lines) == 1
    return lines


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_trains_and_equals_the_single_process(alone, tmp_path, processes):
    folder = tmp_path / "run"
    done = launched(processes, *OPTIONS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in alone[0].iterdir())
    for path in folder.glob("*.pt"):
        found, expected = (torch.load(f / path.name, weights_only=True) for f in (folder, alone[0]))
        assert found["params.head.weight"].dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    lines = zip(metrics(folder), metrics(alone[0]), strict=True)
    for found, expected in lines:
        for key in found.keys() - {"seconds", "samples_per_second", "peak_memory"}:
            same = found[key] == expected[key]  # also names, and null for what there is not yet
            assert same or found[key] == pytest.approx(expected[key], rel=1e-12), key
    assert done.stdout.count("writing to") == 1 and table(done.stdout) == table(alone[1])
    settings = json.loads((folder / "config.json").read_text())
    assert settings["processes"] == processes and settings["status"] == "finished"


@pytest.mark.slow
def test_a_directory_in_use_is_one_line_and_no_traceback(tmp_path):
    (tmp_path / "mine").touch()
    done = launched(2, "--out", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("gradfilter demo: --out: expected a new or empty directory") == 1
    assert "_connect.py" not in done.stderr  # torchrun has a traceback of its own


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_variable_of_torchrun_alone_makes_no_group(monkeypatch, name):
    for other in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "2")
    assert started_processes() == 1


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batch_is_one_line(tmp_path):
    done = launched(3, "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("gradfilter demo:")]
    assert said == [
        "gradfilter demo: torchrun: expected 1, 2, 4 or 8 processes, for 8 microbatches, found 3. "
        "Choose another --nproc-per-node."
    ]
    assert not (tmp_path / "run").exists()
