"""A run that was killed and resumed equals the uninterrupted run, bit for bit."""

import io
import os
import random
import shutil
import signal
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from _lab import command, config, metrics, numbers, only_run, process, refused
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train import _archive
from gradfilter.lab.train._archive import Checkpoint, add, checkpoints, keep_until, recover
from gradfilter.lab.train._build_training import build_training as begin_on
from gradfilter.lab.train._record import resume, write_point
from gradfilter.lab.train._run_place import place_of
from gradfilter.lab.train._train import recorded as recorded_in
from gradfilter.lab.train._train_command import parse_train

# argv: the step to die after, or -n to die in the middle of writing the n-th checkpoint; options.
DIES = """
import os, signal, sys, zipfile
from gradfilter.lab._cli import main
from gradfilter.lab.train import _train as _loop

when, advance, die = int(sys.argv[1]), _loop.advance, lambda: os.kill(os.getpid(), signal.SIGKILL)

def mortal(run, until, *, stopped, tick):
    def counted():
        tick()
        if run.done == when:
            die()
    advance(run, until, stopped=stopped, tick=counted)

_loop.advance = mortal
written, write = [0], zipfile.ZipFile.writestr

def half(self, name, content):
    if isinstance(name, str) and "step" in name:
        written[0] += 1
        if written[0] == -when:
            write(self, name, content[: len(content) // 2])
            self.fp.flush()
            die()
    write(self, name, content)

zipfile.ZipFile.writestr = half
main(sys.argv[2:])
"""

BASE = ["train", "--label-noise", 0.3, "--epochs", 4, "--batch-size", 96, "--model", "mlp_16"]
RUNS = {
    "agreement, momentum and a cosine": (
        "--microbatches 4 --agree 0.9 --schedule cosine --save-checkpoint 1 --budget-clip 0.3 "
        "--ema 0.9"
    ),
    "a centre that moves": "--microbatches 4 --centered-clip 0.3 --optimizer adam",
    "adam, dropout, plateau, loaded by processes": (
        "--optimizer adam --learning-rate 1e-3 --model-additions dropout-0.2 --schedule plateau "
        "--lr-patience 1 --workers 2"
    ),
    "a class of torch whose first step differs, and a cosine": (
        "--optimizer torch:ASGD --learning-rate 0.05 --weight-decay 1e-3 --schedule cosine "
        "--optimizer-arguments t0=20 --microbatches 4 --resume-every 3"
    ),
    "a class of torch with a product of factors": "--optimizer torch:NAdam --learning-rate 1e-3",
    "LookSAM, by a counter": "--sam 0.1 --look-sam 3 --epochs 1.5 --resume-every 4",
    "BatchNorm, GSAM, AGC, between two epochs": (
        "--model resnet18_1 --model-additions batchnorm --microbatches 3 --samples-per-class 1 "
        "--batch-size None --sam 0.05 --gsam 0.4 --agc 0.02 --epochs 1.5 --resume-every 3 "
        "--train-split 500"
    ),
}


def begin(config):
    return begin_on(config, torch.device("cpu"))


def recorded(run, stopped):
    place = place_of(run.config)
    place.mkdir(parents=True)
    return recorded_in(run, place, False, stopped)


def last_line(*args):
    """Return the last line of a refused command; a run printed more before it."""
    code, _, err = command(*args)
    assert code == 2, err
    return err.splitlines()[-1]


def files(folder):
    """Everything that a run leaves and that clocks do not touch."""
    run = only_run(folder)
    point = torch.load(run / "resume.pt", weights_only=True)
    clocks = {"seconds", "epoch_seconds", "peak_memory"}
    saved = {
        c: _archive.read_tensors(run / "checkpoints.zip", c)
        for c in checkpoints(run / "checkpoints.zip")
    }
    lines = [numbers(line) for line in metrics(run)]
    return {k: v for k, v in point.items() if k not in clocks}, saved, lines


def assert_same(found, expected):
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.keys() == b.keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    for checkpoint, flat in expected[1].items():
        for name, tensor in flat.items():
            assert torch.equal(found[1][checkpoint][name], tensor), (checkpoint, name)
    assert found[2] == expected[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_step_and_resumed(name, tmp_path):
    options = [*BASE, *RUNS[name].split()]
    assert command(*options, "--save-dir", tmp_path / "whole")[0] == 0
    expected = files(tmp_path / "whole")
    total = config(only_run(tmp_path / "whole"))["total_steps"]
    when = random.Random(name).randrange(2, total)
    broken = [*options, "--save-dir", tmp_path / "broken"]
    killed = process(DIES, when, *broken)
    assert killed.returncode == -9, killed.stderr
    assert config(only_run(tmp_path / "broken"))["status"] == "running"
    code, out, err = command(*broken, "--resume")
    assert code == 0, err
    assert_same(files(tmp_path / "broken"), expected)
    code, out, _ = command(*broken, "--resume")
    assert (code, out.startswith("finished already")) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("written", [1, 3])
def test_killed_while_a_checkpoint_is_written(written, tmp_path):
    options = [*BASE, "--save-checkpoint", 1, "--epochs", 3]
    assert command(*options, "--save-dir", tmp_path / "whole")[0] == 0
    broken = [*options, "--save-dir", tmp_path / "broken"]
    assert process(DIES, -written, *broken).returncode == -9
    if written > 1:
        half = only_run(tmp_path / "broken") / "checkpoints.zip"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_archive, "PATIENCE", 0.1)
            with pytest.raises(UsageError, match=r"half-written.*--resume"):
                checkpoints(half)
    assert command(*broken, "--resume")[0] == 0
    assert_same(files(tmp_path / "broken"), files(tmp_path / "whole"))


@pytest.mark.parametrize("step", [0, 20])
def test_interrupted_runs_go_on_where_they_were(step, tmp_path):
    run = begin(parse_train([*map(str, BASE[1:]), "--save-dir", str(tmp_path / "broken")]).settings)
    assert not recorded(run, lambda: run.done == step)
    place = only_run(tmp_path / "broken")
    assert config(place)["status"] == "interrupted"
    assert torch.load(place / "resume.pt", weights_only=True)["done"] == step
    assert command(*BASE, "--save-dir", tmp_path / "broken", "--resume")[0] == 0
    assert command(*BASE, "--save-dir", tmp_path / "whole")[0] == 0
    assert_same(files(tmp_path / "broken"), files(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it ends a process instead")
@pytest.mark.parametrize(
    ("name", "workers"), [("SIGINT", 0), ("SIGTERM", 0), ("SIGTERM", 2), ("SIGHUP", 0)]
)
def test_ctrl_c_and_polite_kills_finish_the_step_and_save_the_point(name, workers, tmp_path):
    options = [*BASE, "--workers", workers]
    # The process that runs the tests may ignore them; a scheduler tells every process of the group.
    heard = f"import os, signal\nsignal.signal(signal.{name}, signal.SIG_DFL)\nos.setpgrp()\n"
    if name == "SIGINT":
        heard = heard.replace("SIG_DFL", "default_int_handler")
    asked = DIES.replace("os.kill(os.getpid(), signal.SIGKILL)", f"os.killpg(0, signal.{name})")
    stopped = process(heard + asked, 20, *options, "--save-dir", tmp_path / "broken")
    assert stopped.returncode == 128 + getattr(signal, name), stopped.stderr
    assert "interrupted after step 20 of" in stopped.stdout and "--resume" in stopped.stdout
    assert stopped.stderr.count("\n") == stopped.stderr.count("epoch ") + 1, stopped.stderr
    run = only_run(tmp_path / "broken")
    assert config(run)["status"] == "interrupted"
    assert torch.load(run / "resume.pt", weights_only=True)["done"] == 20
    assert command(*options, "--save-dir", tmp_path / "broken", "--resume")[0] == 0
    assert command(*options, "--save-dir", tmp_path / "whole")[0] == 0
    assert_same(files(tmp_path / "broken"), files(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_while_a_run_of_no_steps_begins_anew(tmp_path, monkeypatch):
    run = begin(parse_train([*map(str, BASE[1:]), "--save-dir", str(tmp_path / "0")]).settings)
    assert not recorded(run, lambda: True)
    unlink = Path.unlink
    for last in range(1, 5):
        options = [*BASE, "--save-dir", tmp_path / str(last), "--resume"]
        shutil.copytree(tmp_path / "0", tmp_path / str(last))
        dropped = []

        def mortal(path, missing_ok=False, last=last, dropped=dropped):
            unlink(path, missing_ok=missing_ok)
            dropped.append(path.name)
            if len(dropped) == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", mortal)
            assert command(*options)[0] == 130
        code, _, err = command(*options)
        assert code == 0, (dropped, err)


def test_a_run_that_lost_its_record_or_its_points_is_not_written_over(tmp_path):
    options = [*BASE, "--save-dir", tmp_path]
    run = begin(parse_train(list(map(str, options[1:]))).settings)
    assert not recorded(run, lambda: run.done == 50)
    place = only_run(tmp_path)
    record = (place / "config.json").read_text()
    (place / "config.json").unlink()
    before = {path: path.read_bytes() for path in place.iterdir()}
    assert "without its config.json" in refused(*options)
    for name in ("resume.pt", "resume.before.pt"):
        (place / name).unlink()
        del before[place / name]
    assert "resume.pt to resume from is gone" in refused(*options)
    (place / "config.json").write_text(record)
    assert "resume.pt to resume from is gone" in last_line(*options, "--resume")
    assert {path: path.read_bytes() for path in before} == before
    assert config(place)["status"] == "interrupted"


def test_the_most_memory_is_that_of_the_whole_run(tmp_path):
    settings = parse_train(list(map(str, BASE[1:]))).settings
    run, later = begin(settings), begin(settings)
    run.peak_memory = 1e15
    write_point(tmp_path, run)
    resume(tmp_path, later)
    assert later.peak_memory == 1e15


# The archive


def test_an_archive_of_gigabytes_is_put_back(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # bytes from which the directory has more
    for number in range(2):
        add(archive, Checkpoint(number, number, 1.0).entry, b"x" * 2000)
    before = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        kept = opened.start_dir.to_bytes(8, "big") + before[opened.start_dir :]
    assert b"PK\x06\x07" in kept
    add(archive, Checkpoint(2, 2, 1.0).entry, b"x" * 2000)
    (tmp_path / ".a.zip.directory").write_bytes(kept)
    strict(monkeypatch)
    recover(archive)
    assert archive.read_bytes() == before


def strict(monkeypatch):
    """Read a long directory as later versions of Python do: it says where in the file it begins."""
    read = zipfile._EndRecData64

    def checked(file, offset, record):
        end = file.seek(0, io.SEEK_END)
        place = end + offset if offset < 0 else offset
        file.seek(place - zipfile.sizeEndCentDir64Locator)
        locator = file.read(zipfile.sizeEndCentDir64Locator)
        _, _, start, _ = struct.unpack(zipfile.structEndArchive64Locator, locator)
        if start > place - zipfile.sizeEndCentDir64Locator - zipfile.sizeEndCentDir64:
            raise zipfile.BadZipFile("Corrupt zip64 end of central directory locator")
        return read(file, offset, record)

    monkeypatch.setattr(zipfile, "_EndRecData64", checked)


def test_a_disk_that_refuses_at_the_end_leaves_the_archive_as_it_was(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    add(archive, Checkpoint(0, 0, 0.0).entry, b"x" * 1000)
    before, settle, asked = archive.read_bytes(), os.fsync, []

    def full(file):
        asked.append(file)
        if len(asked) == 2:  # the directory is kept, the entry is written
            raise OSError(28, "No space left on device")
        settle(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        add(archive, Checkpoint(1, 5, 1.0).entry, b"x" * 1000)
    assert archive.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_an_append_that_dies_at_any_byte_is_undone(tmp_path):
    archive = tmp_path / "a.zip"
    first, second = Checkpoint(0, 0, 0.0), Checkpoint(1, 5, 1.0)
    add(archive, first.entry, _archive.tensor_bytes({"w": torch.arange(5.0)}))
    before = archive.read_bytes()
    add(archive, second.entry, _archive.tensor_bytes({"w": torch.arange(7.0)}))
    after = archive.read_bytes()
    start = zipfile.ZipFile(tmp_path / "a.zip").start_dir  # where the directory is now
    assert start > len(before) - 200
    with zipfile.ZipFile(archive) as opened:
        kept_at = opened.infolist()[1].header_offset
    kept = kept_at.to_bytes(8, "big") + before[kept_at:]
    for size in range(kept_at, len(after), 37):
        archive.write_bytes(after[:size] + before[size:])
        (tmp_path / ".a.zip.directory").write_bytes(kept)
        recover(archive)
        assert archive.read_bytes() == before
        assert [c.id for c in checkpoints(archive)] == [0]


def test_a_full_disk_leaves_the_archive_as_it_was(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    add(archive, "00000-step-0-epoch-0.pt", _archive.tensor_bytes({"w": torch.ones(3)}))
    before = archive.read_bytes()
    write = zipfile.ZipFile.writestr

    def full(self, name, content):
        write(self, name, content[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space"):
        add(archive, "00001-step-5-epoch-1.pt", b"x" * 1000)
    monkeypatch.undo()
    assert archive.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_checkpoints_after_the_point_are_dropped(tmp_path):
    archive = tmp_path / "a.zip"
    for number, step in enumerate((0, 5, 9)):
        add(archive, Checkpoint(number, step, step / 5).entry, _archive.tensor_bytes({}))
    keep_until(archive, 5)
    assert [c.step for c in checkpoints(archive)] == [0, 5]


def test_resume_refuses_what_it_cannot_go_on_from(tmp_path):
    options = [*BASE, "--save-dir", tmp_path, "--epochs", 1]
    assert command(*options)[0] == 0
    run = only_run(tmp_path)
    assert "there is a run" in refused(*options)
    point = run / "resume.pt"
    (run / "config.json").write_text((run / "config.json").read_text().replace("finished", "x"))
    point.write_bytes(point.read_bytes()[:-100])
    assert "resume.pt' is damaged" in refused(*options, "--resume")
    torch.save({"a": torch.ones(1)}, point)
    assert "does not fit this run" in refused(*options, "--resume")
