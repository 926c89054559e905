"""Measurements in parts: by hand, by several processes, and after an interruption."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from _lab import command, refused
from _stats_run import numbers, train
from gradfilter.lab.stats import _measurement
from gradfilter.lab.stats._stats_files import appending, origin_of, part_path, read, records_of


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in processes of their own here: sums are then the same to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("train"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run: numbers of one test are not found by another."""
    return shutil.copytree(trained, tmp_path / "runs" / "run")


# Parts


def test_ranges_by_hand_become_the_file_of_the_single_run(run, tmp_path):
    whole, _ = numbers(shutil.copytree(run, tmp_path / "whole"), "--batch-size", 20)
    settings = ["--batch-size", 20, "--skip"]
    numbers(run, *settings, 40)
    numbers(run, *settings, 0, "--num-samples", 20)
    code, out, _ = command("stats", run, "--last", *settings, 20, "--num-samples", 20)
    assert code == 0 and "the parts cover the split" in out
    assert (run / "stats" / whole.name).read_bytes() == whole.read_bytes()


@pytest.fixture
def counted(monkeypatch):
    """The sizes of all batches that are measured."""
    sizes = []
    original = _measurement.measure_of

    def counting(config, model):
        measure = original(config, model)

        def counted(images, labels, ids):
            sizes.append(len(images))
            return measure(images, labels, ids)

        return counted

    monkeypatch.setattr(_measurement, "measure_of", counting)
    return sizes


# While it measures the eighth batch. argv: options.
DIES = """
import os, signal, sys
from gradfilter.lab._cli import main
from gradfilter.lab.stats import _measurement

measure_of, batches = _measurement.measure_of, []

def mortal(config, model):
    measure = measure_of(config, model)
    def counted(*batch):
        batches.append(len(batch[0]))
        if len(batches) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(*batch)
    return counted

_measurement.measure_of = mortal
main(sys.argv[1:])
"""


def test_killed_with_sigkill_it_goes_on_where_it_was(run, tmp_path, counted):
    settings = ["--metric", "loss_hessian_trace", "--num-probes", 20, "--batch-size", 5]
    whole, _ = numbers(shutil.copytree(run, tmp_path / "whole"), *settings)
    process = subprocess.run(
        [sys.executable, "-c", DIES, "stats", run, "--last", *map(str, settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == -signal.SIGKILL
    part = run / "stats" / f"{whole.stem}-id-0.jsonl"
    done = part.read_bytes().count(b"\n") - 1
    assert done == 7
    counted.clear()
    found, _ = numbers(run, *settings)
    assert counted == [5] * (20 - done)
    assert found.read_bytes() == whole.read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_between_two_batches_is_clean(number, run, tmp_path, counted, monkeypatch):
    whole, _ = numbers(shutil.copytree(run, tmp_path / "whole"), "--batch-size", 30)
    counted.clear()
    original = _measurement.measure_of

    def interrupting(config, model):
        measure = original(config, model)

        def measured(*batch):
            if len(counted) == 1:
                signal.raise_signal(number)
            return measure(*batch)

        return measured

    with monkeypatch.context() as patch:
        patch.setattr(_measurement, "measure_of", interrupting)
        code, out, err = command("stats", run, "--last", "--batch-size", 30)
    assert (code, err) == (128 + number, "") and "the same command continues" in out
    assert counted == [30, 30]
    found, _ = numbers(run, "--batch-size", 30)
    assert counted == [30, 30, 30, 10]
    assert found.read_bytes() == whole.read_bytes()


def test_parts_of_more_processes_than_there_are_now_count(run, tmp_path, counted):
    whole, _ = numbers(shutil.copytree(run, tmp_path / "whole"), "--batch-size", 20)
    numbers(run, "--batch-size", 20, "--num-samples", 40, "--outname", "first")
    facts, records = origin_of(read(whole)), records_of(read(next((run / "stats").iterdir())))
    with appending(part_path(run / "stats", whole.stem, 7), facts) as append:
        append(records[0])
    counted.clear()
    found, _ = numbers(run, "--batch-size", 20)
    assert counted == [20, 20, 20]
    assert found.read_bytes() == whole.read_bytes()
    assert len(list((run / "stats").iterdir())) == 2


def test_a_smaller_batch_goes_on_after_memory_ran_out(run, counted, monkeypatch):
    original = _measurement.measure_of

    def greedy(config, model):
        measure = original(config, model)

        def measured(images, labels, ids):
            if len(counted) == 1:
                raise torch.OutOfMemoryError("no memory")
            return measure(images, labels, ids)

        return measured

    with monkeypatch.context() as patch:
        patch.setattr(_measurement, "measure_of", greedy)
        assert "--batch-size: 40 samples" in refused("stats", run, "--last", "--batch-size", 40)
    _, found = numbers(run, "--batch-size", 15)
    assert counted == [40, 5, 15, 15, 15, 10]
    assert len(found["stats"]) == 100


def test_what_is_measured_is_not_measured_again(run, counted):
    path, _ = numbers(run)
    part_path(path.parent, path.stem, 0).touch()  # killed just after the file was there
    before = path.stat().st_mtime_ns
    counted.clear()
    code, out, _ = command("stats", run, "--last")
    assert code == 0 and path.name in out.replace("\n", "")
    assert counted == [] and path.stat().st_mtime_ns == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_at_the_end_is_one_line_and_the_batches_are_kept(run, monkeypatch, counted):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_measurement, "write", full)
        assert "No space left on device" in refused("stats", run, "--last")
    counted.clear()
    numbers(run)
    assert counted == []


def test_a_disk_full_in_the_middle_of_a_batch_is_one_line_and_the_rest_is_kept(run, counted):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        line = refused("stats", run, "--last", "--batch-size", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large" in line
    (part,) = (run / "stats").iterdir()
    assert part.stat().st_size == 4000 and not part.read_bytes().endswith(b"\n")
    kept = len(counted) - 1
    assert kept > 3
    numbers(run, "--batch-size", 5)
    assert len(counted) == 21  # the batch that was cut in two is measured twice


# Several processes


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(run, tmp_path):
    settings = ["--metric", "jacobian", "--gen-strategy", "svd-10", "--batch-size", 16]
    whole, _ = numbers(shutil.copytree(run, tmp_path / "whole"), *settings)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "gradfilter", "stats", run, "--last"]
        + [str(setting) for setting in settings],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (run / "stats").iterdir()] == [whole.name]
    assert (run / "stats" / whole.name).read_bytes() == whole.read_bytes()
    assert done.stdout.count("numbers in") == 1
