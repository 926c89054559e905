"""Bad input of `gradfilter report`: one clear line for each; other files are not overwritten."""

import json

import pytest

from _report_runs import evaluation, make_run, make_stats, sparse
from gradfilter.lab._cli import main
from gradfilter.lab.report._report import report
from gradfilter.lab.report._report_config import ReportConfig
from gradfilter.lab.report._runs import read_runs
from gradfilter.lab.train._run_place import METRICS
from gradfilter.lab.train._train import train
from gradfilter.lab.train._train_config import TrainConfig


def refused(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, options)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert said[-1].startswith("gradfilter report: ")
    return said[-1], said[:-1]


def test_a_directory_that_is_not_there(tmp_path, capsys):
    line, _ = refused(capsys, tmp_path / "nowhere")
    assert f"expected a directory with trainings, found none at '{tmp_path / 'nowhere'}'" in line


def test_a_directory_without_runs(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")  # of some other program
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text(json.dumps({"command": "demo", "settings": {}}))
    line, warned = refused(capsys, tmp_path)
    assert "no training that can be read below" in line and "gradfilter train" in line
    assert not warned and not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "metrics",
    [
        '{"step": 1}\n{"step": 2, "loss"\n',
        '{"step": 1',
        '{"step": Infinity}\n',
        "[1, 2]\n",
        '{"step": 1, "loss": "large"}\n',
        '{"loss": 1.0}\n',
        "\xff\xfe",
        "",
        None,
    ],
)
def test_metrics_that_cannot_be_read_are_named_and_the_others_shown(tmp_path, capsys, metrics):
    bad = make_run(tmp_path, seed=0, status="running") / METRICS
    bad.unlink() if metrics is None else bad.write_bytes(metrics.encode("latin-1"))
    line, warned = refused(capsys, tmp_path)
    assert str(bad) in line and len(warned) == 1 and str(bad) in warned[0]
    good = make_run(tmp_path, seed=1)
    runs, skipped = read_runs([tmp_path])
    assert [run.path for run in runs] == [good]
    assert len(skipped) == 1 and str(bad) in skipped[0] and "(running)" in skipped[0]


def test_what_was_skipped_is_said_and_is_on_the_page(tmp_path, capsys):
    bad = make_run(tmp_path, seed=0) / METRICS
    bad.write_text("half")
    make_run(tmp_path, seed=1, evaluations=[sparse(1)])
    assert report(ReportConfig((tmp_path,))) == 0
    said = capsys.readouterr()
    assert said.err.startswith("skipped: ") and str(bad) in said.err
    assert "1 run in 1 setting: " in said.out
    assert str(bad) in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "config", ["{", '{"command": "train", "settings": {"model": {}}}', '{"command": "train"}']
)
def test_a_record_that_cannot_be_read_is_named(tmp_path, config):
    bad = make_run(tmp_path, seed=0) / "config.json"
    bad.write_text(config)
    good = make_run(tmp_path, seed=1)
    runs, skipped = read_runs([tmp_path])
    assert [run.path for run in runs] == [good]
    assert len(skipped) == 1 and str(bad) in skipped[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', "wrong columns"])
def test_measurements_that_cannot_be_read_are_named(tmp_path, content):
    place = make_run(tmp_path)
    path = make_stats(place, "jacobian", [1.0])
    if content == "wrong columns":
        found = json.loads(path.read_text())
        found["metadata"]["columns"] = ["one", "two"]
        content = json.dumps(found)
    path.write_text(content)
    runs, skipped = read_runs([tmp_path])
    assert [run.measures for run in runs] == [()]
    assert len(skipped) == 1 and str(path) in skipped[0]


def test_a_directory_with_other_files_is_left_alone(tmp_path, capsys):
    make_run(tmp_path / "a", evaluations=[sparse(1)])
    other = tmp_path / "site" / "index.html"
    other.parent.mkdir()
    other.write_text("mine")
    line, _ = refused(capsys, tmp_path / "a", "--out", other.parent)
    assert "--out: expected a new or empty directory" in line
    assert [path.name for path in other.parent.iterdir()] == ["index.html"]
    assert other.read_text() == "mine"


@pytest.mark.parametrize("inside", ["file", "file/deeper"])
def test_an_output_that_cannot_be_written(tmp_path, capsys, inside):
    make_run(tmp_path / "a", evaluations=[sparse(1)])
    (tmp_path / "file").write_text("mine")
    line, _ = refused(capsys, tmp_path / "a", "--out", tmp_path / inside)
    assert "--out: cannot write to the directory" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_manifest_cannot_make_a_report_remove_files_elsewhere(tmp_path):
    make_run(tmp_path / "a", evaluations=[sparse(1)])
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "b").mkdir()
    manifest = {"command": "report", "files": ["../mine", str(mine), "old.csv"]}
    (tmp_path / "b" / "report.json").write_text(json.dumps(manifest))
    (tmp_path / "b" / "old.csv").write_text("")
    report(ReportConfig((tmp_path / "a",), out=tmp_path / "b"))
    assert mine.exists() and not (tmp_path / "b" / "old.csv").exists()


def test_an_unknown_option(capsys):
    line, _ = refused(capsys, "--colour", "red")
    assert "--colour" in line


def test_numbers_that_were_never_measured_do_no_harm(tmp_path):
    nothing = dict.fromkeys(evaluation(1)) | {"step": 1}
    for agree in (None, 0.9):
        make_run(tmp_path, agree=agree, microbatches=2, evaluations=[nothing])
    assert report(ReportConfig((tmp_path,))) == 0


@pytest.mark.parametrize("large", [1e308, -1e308, 5e300])
@pytest.mark.parametrize("name", ["train_loss", "test_loss", "train_seconds"])
def test_numbers_that_no_axis_can_hold_are_not_drawn(tmp_path, name, large):
    run = make_run(tmp_path, evaluations=[sparse(1), sparse(2)])
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    for line, value in zip(lines, (large, -large), strict=False):
        line[name] = value
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report(ReportConfig((tmp_path,))) == 0


def test_a_run_as_it_is_really_left(tmp_path):
    """The other tests write runs themselves; this one is trained."""
    config = TrainConfig(
        save_dir=tmp_path, model="mlp_4", epochs=2.0, label_noise=0.2, microbatches=2, batch_size=80
    )
    assert train(config) == 0
    assert report(ReportConfig((tmp_path,))) == 0
    assert {path.name for path in (tmp_path / "report").glob("*.png")} >= {
        "test-accuracy-by-samples.png",
        "memorised-by-seconds.png",
        "cosine-by-samples.png",
    }


def test_a_demo_is_named_as_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--steps", "1", "--out", str(tmp_path / "demo")])
    assert stop.value.code == 0
    line, warned = refused(capsys, tmp_path)
    assert (
        f"{str(tmp_path / 'demo')!r} is of gradfilter demo, which drew its own curves.png" in line
    )
    assert "runs of gradfilter train" in line and "not the record" not in line
    make_run(tmp_path, evaluations=[sparse(1)])
    runs, skipped = read_runs([tmp_path])
    assert len(runs) == len(skipped) == len(warned) == 1
