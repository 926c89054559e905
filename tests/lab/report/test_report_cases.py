"""`gradfilter report` with missing, unfinished, unusual or existing files."""

import ast
import json
import math
from pathlib import Path

from _report_page import Page, read
from _report_runs import evaluation, make_run, make_stats, sparse
from gradfilter.lab import report as package
from gradfilter.lab.report._report import report
from gradfilter.lab.report._report_config import ReportConfig


def test_what_is_missing_is_named_with_its_reason(tmp_path):
    make_run(tmp_path / "runs", evaluations=[evaluation(1, memorised=math.nan)])
    assert report(ReportConfig((tmp_path / "runs",))) == 0
    page = Page((tmp_path / "runs" / "report" / "index.html").read_text())
    for reason in (
        "Memorised wrong labels: not measured in any run, because no label is wrong.",
        "Needs finished runs that differ in --label-noise alone.",
        "Needs finished runs of one model in 3 or more widths",
        "Needs finished runs that differ in --agc, --optimizer or --batch-size alone.",
        "Needs finished runs with --sam.",
        "Needs runs with several rows per batch",
        "Needs gradfilter stats on some of these runs.",
        "At equal time: needs two or more finished settings",
    ):
        assert reason in page.text
    assert not any("memorised" in name for name in page.images)
    assert "Not measured in any of these runs: memorised %." in page.text


def test_what_users_wrote_is_text_and_not_markup(tmp_path):
    name = "<script>alert(1)</script>"
    for data in (f"folder:{name}", "digits"):
        make_run(tmp_path / "runs", data=data, evaluations=[sparse(1)])
    report(ReportConfig((tmp_path / "runs",)))
    text = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert name not in text and f"folder:{name}" in Page(text).text


def test_equal_time_is_the_largest_that_all_finished_runs_reached(tmp_path):
    fast = [sparse(step, cosine=math.nan, noise_scale=math.nan) for step in range(5)]
    make_run(tmp_path / "a", seed=0, agree=0.9, microbatches=2, evaluations=fast)  # up to 2.0 s
    slow = [sparse(step, seconds=3.0 * step, test_accuracy=0.1 * step) for step in range(4)]
    make_run(tmp_path / "a", seed=0, evaluations=slow, microbatches=2)
    make_run(tmp_path / "a", seed=1, evaluations=slow[:1], status="running", microbatches=2)
    report(ReportConfig((tmp_path / "a",)))
    table = read(tmp_path / "a" / "report", "equal-time").set_index("setting")
    # The slow run was evaluated at 0 and 3 s.
    assert table["seconds_mean"].to_dict() == {"plain": 0.0, "agree 0.9": 2.0}
    assert table["test_accuracy_mean"]["plain"] == 0.0
    assert table["test_accuracy_mean"]["agree 0.9"] == evaluation(4)["test_accuracy"]
    assert "At equal time: 2 s" in (tmp_path / "a" / "report" / "index.html").read_text()


def test_unfinished_runs_are_marked_and_kept_apart(tmp_path):
    make_run(tmp_path / "a", seed=0, evaluations=[sparse(1)])
    make_run(tmp_path / "a", seed=1, evaluations=[sparse(1)], status="interrupted")
    report(ReportConfig((tmp_path / "a",)))
    page = Page((tmp_path / "a" / "report" / "index.html").read_text())
    labels = [row[0] for row in page.tables["table-accuracy"][1:]]
    assert labels == ["plain", "plain (unfinished)"]
    assert "2 runs in 2 settings; 1 unfinished" in " ".join(page.text.split())
    assert [row[2] for row in page.tables["table-runs"][1:]] == ["finished", "interrupted"]


def test_measurements_tell_wrong_labels_from_right_ones(tmp_path):
    place = make_run(tmp_path / "a", evaluations=[sparse(4)])
    make_stats(place, "loss_gradient", [9.0, 8.0], targets=[0, 1])
    make_stats(place, "loss_gradient", [1.0, 5.0, 3.0, 7.0], targets=[0, 1, 0, 1])  # has more
    make_stats(place, "jacobian", [1.0, 2.0], normalization="softmax")
    make_stats(place, "sharpness", [(1.0, 2.0), (3.0, 6.0)], columns=["sharpness", "hessian_top"])
    report(ReportConfig((tmp_path / "a",)))
    table = read(tmp_path / "a" / "report", "measurements").set_index(["variant", "column"])
    gradient = table.loc[("loss_gradient-train", "loss_gradient")]
    assert gradient["samples_mean"] == 4
    assert (gradient["mean_mean"], gradient["right_mean"], gradient["wrong_mean"]) == (4, 2, 6)
    assert table.loc[("sharpness-train", "hessian_top")]["mean_mean"] == 4
    assert ("jacobian-train-softmax", "jacobian") in table.index


def test_the_same_report_is_the_same_bytes_and_replaces_the_earlier_one(tmp_path):
    make_run(tmp_path / "a", microbatches=2, evaluations=[sparse(1), sparse(2)])
    report(ReportConfig((tmp_path / "a",), out=tmp_path / "b"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    report(ReportConfig((tmp_path / "a",), out=tmp_path / "b"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    make_run(tmp_path / "c", evaluations=[sparse(1)])  # has no rows that could agree
    report(ReportConfig((tmp_path / "c",), out=tmp_path / "b"))
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert "cosine-by-samples.png" in before and "cosine-by-samples.png" not in names
    assert set(json.loads((tmp_path / "b" / "report.json").read_text())["files"]) == names - {
        "report.json"
    }


def test_figures_are_drawn_without_pyplot():
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert "pyplot" not in f"{node.module} {[a.name for a in node.names]}", path
            if isinstance(node, ast.Import):
                assert all("pyplot" not in a.name for a in node.names), path
