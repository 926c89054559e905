"""Files of the lab: they are written whole, are checked, and replace no other files."""

import json
import os
import sys

import pytest

from _lab import command, config, metrics, numbers, only_run, process, refused
from gradfilter.lab._run_files import append_json_line, open_own, write_bytes
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._archive import add, checkpoints, recover

SMALL = ["train", "--model", "mlp_8", "--epochs", 3, "--save-checkpoint", 1, "--log-level", "error"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


@pytest.fixture
def victim(tmp_path):
    """A file that is not the lab's, with what it must still hold at the end."""
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    yield path
    assert path.read_bytes() == b"precious"


def planted(folder, victim, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(victim)


# Links in the places of a run's files


def test_a_file_is_written_through_no_link(tmp_path, victim):
    folder = tmp_path / "run"
    planted(folder, victim, ".config.json.part", "metrics.jsonl", "checkpoints.zip")
    write_bytes(folder / "config.json", b"{}")
    assert (folder / "config.json").read_bytes() == b"{}"
    assert not list(folder.glob(".*"))
    with pytest.raises(UsageError, match=r"metrics.jsonl' is a symbolic link.*Remove it"):
        append_json_line(folder / "metrics.jsonl", {"step": 0})
    with (
        pytest.raises(UsageError, match="symbolic link"),
        open_own(folder / "checkpoints.zip", "wb"),
    ):
        pass


def test_a_link_that_leads_nowhere_makes_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "new")
    with pytest.raises(UsageError, match="symbolic link"):
        append_json_line(tmp_path / "metrics.jsonl", {"step": 0})
    assert not (tmp_path / "new").exists()


def test_a_link_planted_between_look_and_open(tmp_path, victim, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    monkeypatch.setattr(type(tmp_path), "is_symlink", lambda self: False)
    with pytest.raises(OSError, match="symbolic links"):
        append_json_line(tmp_path / "metrics.jsonl", {"step": 0})


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No such device"):
        append_json_line(tmp_path / "metrics.jsonl", {"step": 0})


def test_an_archive_that_is_a_link_is_neither_added_to_nor_cut(tmp_path):
    add(tmp_path / "other.zip", "00000-step-0-epoch-0.0.pt", b"theirs")
    before = (tmp_path / "other.zip").read_bytes()
    (tmp_path / "own.zip").symlink_to(tmp_path / "other.zip")
    with pytest.raises(UsageError, match="symbolic link"):
        add(tmp_path / "own.zip", "00001-step-1-epoch-1.0.pt", b"ours")
    (tmp_path / ".own.zip.directory").write_bytes(bytes(8) + b"PK")
    with pytest.raises(UsageError):
        recover(tmp_path / "own.zip")
    assert (tmp_path / "other.zip").read_bytes() == before


@pytest.mark.parametrize("name", [".index.html.part", ".report.json.part"])
def test_a_report_is_written_through_no_link(name, tmp_path, victim):
    assert command(*SMALL, "--save-dir", tmp_path / "runs")[0] == 0
    planted(tmp_path / "report", victim, name)
    assert command("report", tmp_path / "runs", "--out", tmp_path / "report")[0] == 0


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", ".config.json.part", ".resume.pt.part", "run.lock"]
)
def test_a_training_goes_on_through_no_link(name, tmp_path, victim):
    options = [*SMALL, "--save-dir", tmp_path / "runs"]
    assert command(*options)[0] == 0
    run = only_run(tmp_path / "runs")
    # As a run that was killed before it had a point.
    for old in ("config.json", "resume.pt", "resume.before.pt", name):
        (run / old).unlink(missing_ok=True)
    if name != "metrics.jsonl":
        (run / "metrics.jsonl").write_text("")
    planted(run, victim, name)
    if name == "run.lock":
        assert "run.lock' is a symbolic link" in refused(*options)
    else:  # what is cleared away is the link
        assert command(*options)[0] == 0
        assert not (run / name).is_symlink()


# Disks that take a part of what is written


def test_what_is_cut_short_is_written_as_a_whole(tmp_path, monkeypatch):
    """As a signal or a network disk does it: a part now, the rest if it is asked again."""
    import io

    write = io.FileIO.write

    class Short(io.FileIO):
        def write(self, data):
            return write(self, bytes(data)[:7])

    monkeypatch.setattr(
        "gradfilter.lab._run_files.open",
        lambda path, mode, buffering, opener: Short(path, mode.replace("b", ""), opener=opener),
        raising=False,
    )
    append_json_line(tmp_path / "metrics.jsonl", {"step": 12345678901234567890})
    assert metrics(tmp_path) == [{"step": 12345678901234567890}]


# argv: bytes that a file may have at most; options. Every write above that fails half-done.
LIMITED = """
import resource, sys
from gradfilter.lab._cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints.zip"])
def test_a_limit_on_the_size_of_files_loses_nothing(name, tmp_path):
    options = [*SMALL, "--save-dir", tmp_path]
    if name == "metrics.jsonl":  # a line after every step, until they are the largest file
        options += ["--train-split", 100, "--batch-size", 20, "--eval-every", 0.2]
        options += ["--epochs", 9, "--save-checkpoint", 9]
    assert command(*options, "--save-dir", tmp_path / "whole")[0] == 0
    whole = only_run(tmp_path / "whole")
    limit = (whole / name).stat().st_size - 300  # clocks do not always say as many digits
    options += ["--save-dir", tmp_path / "broken"]
    stopped = process(LIMITED, limit, *options)
    assert stopped.returncode == 2 and "File too large" in stopped.stderr, stopped.stderr
    assert "--resume" in stopped.stderr and stopped.stderr.count("\n") == 1
    run = only_run(tmp_path / "broken")
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert not list(run.glob(".*")) and checkpoints(run / "checkpoints.zip")
    assert command(*options, "--resume")[0] == 0
    assert config(run)["status"] == "finished"
    assert list(map(numbers, metrics(run))) == list(map(numbers, metrics(whole)))
    assert checkpoints(run / "checkpoints.zip") == checkpoints(whole / "checkpoints.zip")
