"""`gradfilter runs`: the trainings in a directory, and one line for any other content."""

import json
import math
import os
from io import StringIO
from pathlib import Path

import pytest

from _lab import command, process, refused
from _report_runs import evaluation, make_run
from gradfilter.lab import _list_runs
from gradfilter.lab._list_runs import list_runs
from gradfilter.lab._runs_config import RunsConfig
from gradfilter.lab.train._run_place import METRICS


class Terminal(StringIO):
    def isatty(self):
        return True


def listed(*args):
    code, out, err = command("runs", *args)
    assert (code, err) == (0, "")
    return out.splitlines()


def test_a_training_is_one_line(tmp_path):
    last = evaluation(3, train_loss=0.5, test_accuracy=0.75)
    place = make_run(tmp_path, evaluations=[evaluation(0), last], epochs=8.0, agree=0.97, agc=0.01)
    os.utime(place / "config.json", (0, 0))
    os.utime(place / METRICS, (86400 * 365, 86400 * 365))
    heading, line = listed(tmp_path)
    assert heading.split()[:5] == ["directory", "state", "model", "data", "rule"]
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:5] == [
        *(str(place), "finished", "mlp_256", "digits", "agree 0.97, agc 0.01, sgd 0.05")
    ]
    assert cells[5:8] == ["3/8", "0.5", "75.0"]
    assert cells[8][:4] in ("1970", "1971")  # of the newer file, in local time
    assert heading.index("state") == line.index("finished")


def test_json_has_the_same_numbers(tmp_path):
    make_run(tmp_path, evaluations=[evaluation(3, test_accuracy=0.75)], seed=1, steps=12)
    make_run(tmp_path, evaluations=[], status="interrupted", seed=2)
    (tmp_path / "config.json").write_text("[]")
    found = {one.get("state"): one for one in json.loads("\n".join(listed(tmp_path, "--json")))}
    assert found[None]["error"].startswith("the record of a run ")
    finished, stopped = found["finished"], found["interrupted"]
    assert [finished[name] for name in ("epochs", "step", "steps")] == [None, 3, 12]
    assert finished["test_accuracy"] == 0.75
    assert (stopped["epochs"], stopped["epoch"], stopped["train_loss"]) == (50.0, 0.0, None)


def test_a_filter_at_0_is_listed(tmp_path):
    make_run(tmp_path, agree=0.0, sam=0.05, gsam=0.0, agc=0.0)
    assert "agree 0, sam 0.05, gsam 0, sgd 0.05" in listed(tmp_path)[1]


def test_forms_of_sam_are_listed(tmp_path):
    make_run(tmp_path, sam=0.05, look_sam=5)
    assert "sam 0.05, look-sam 5, sgd 0.05" in listed(tmp_path)[1]


def test_foreign_numbers_are_valid_json_and_short(tmp_path):
    place = make_run(tmp_path, evaluations=[evaluation(3, test_accuracy=1e300)])
    record = json.loads((place / "config.json").read_text())
    record["settings"]["epochs"] = math.inf
    (place / "config.json").write_text(json.dumps(record))
    refuse = lambda constant: pytest.fail(f"{constant} is no JSON")
    (found,) = json.loads("\n".join(listed(tmp_path, "--json")), parse_constant=refuse)
    assert found["epochs"] is None
    assert max(map(len, listed(tmp_path))) < 200 + len(str(tmp_path))


def test_trainings_without_a_number_have_a_dash(tmp_path):
    make_run(tmp_path, evaluations=[evaluation(2, train_loss=math.nan)], steps=9)
    make_run(tmp_path, evaluations=[], status="running", seed=1)
    lines = listed(tmp_path)[1:]
    running, finished = sorted(lines, key=lambda line: " finished " in line)
    assert finished.split("step 2/9")[1].split()[0] == "-"
    assert running.split()[1] == "running" and running.split(" 0/50 ")[1].split()[:2] == ["-", "-"]


def test_on_a_narrow_terminal_a_directory_has_its_own_line(tmp_path, monkeypatch):
    place = make_run(tmp_path)
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    for columns, count in ((70, 5), (500, 3)):
        monkeypatch.setenv("COLUMNS", str(columns))
        out.truncate(out.seek(0))
        assert _list_runs.runs(RunsConfig(dirs=(tmp_path,))) == 0
        lines = out.getvalue().splitlines()
        assert len(lines) == count and sum(line == "-" * columns for line in lines) == 1
        assert lines[-2 if columns == 70 else -1].startswith(str(place))


def test_the_real_thing_is_listed(tmp_path):
    options = ["--model", "mlp_2", "--steps", 2, "--log-level", "error", "--save-dir", tmp_path]
    assert command("train", *options)[0] == 0
    _, line = listed(tmp_path)
    assert " finished " in line and " step 2/2 " in line


def test_no_directory_and_no_training(tmp_path):
    assert listed(tmp_path) == [f"no trainings in {tmp_path}"]
    assert "expected a directory with trainings, found none at" in refused("runs", tmp_path / "x")


RECORDS = {
    "{": "not JSON",
    "[]": "not the record of a run",
    '{"command": "demo"}': "gradfilter demo",
    '{"command": "other", "settings": {}}': "not a run of gradfilter train",
    '{"command": "train", "settings": {"epochs": "x"}}': "epochs does not fit",
    '{"command": "train", "settings": {"epochs": 1' + 400 * "0" + "}}": "epochs does not fit",
    "[" * 100 + "]" * 100: "nested too deeply",
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_or_foreign_directory_is_one_line(record, tmp_path):
    place = make_run(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(record)
    _, run, line = listed(tmp_path)
    assert run.startswith(str(place)) and line.startswith("not listed: ")
    assert RECORDS[record] in line


def test_damaged_metrics_and_metrics_alone_are_one_line_each(tmp_path):
    (make_run(tmp_path, seed=1) / METRICS).write_text('{"step": "x"}\n')
    (make_run(tmp_path, seed=2) / "config.json").unlink()
    lines = listed(tmp_path)
    assert lines[0].startswith("no trainings") and len(lines) == 3
    assert "line 1 of the metrics" in lines[1] and "has no config.json" in lines[2]


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "not a regular file" in listed(tmp_path)[1]


def test_names_and_records_cannot_move_the_cursor(tmp_path, monkeypatch):
    place = make_run(tmp_path / "\x1b[2J[bold]", data="digits\x1b[1A")
    text = (place / "config.json").read_text()
    (place / "config.json").write_text(text.replace('"finished"', '"\\u001b[31mdone[/bold]"'))

    for out in (StringIO(), Terminal()):
        monkeypatch.setattr("sys.stdout", out)
        assert _list_runs.runs(RunsConfig(dirs=(tmp_path,))) == 0
        assert "\x1b[2J" not in out.getvalue() and "\x1b[1A" not in out.getvalue()
        assert "\x1b[31mdone" not in out.getvalue() and "finished" not in out.getvalue()
        assert "[bold]" in out.getvalue()


def test_a_long_text_is_cut(tmp_path):
    place = make_run(tmp_path, model="mlp_8")
    record = json.loads((place / "config.json").read_text())
    record |= {"status": "x" * 10**6, "total_steps": 10**4000}
    record["settings"]["steps"] = 3
    (place / "config.json").write_text(json.dumps(record))
    assert max(map(len, listed(tmp_path))) < 1000


def test_a_list_needs_no_torch(tmp_path):
    make_run(tmp_path)
    code = """
import sys
from gradfilter.lab._cli import main
try:
    main(["runs", sys.argv[1]])
except SystemExit as stop:
    print(stop.code, *({"torch", "numpy", "pandas", "rich"} & {*sys.modules}))
"""
    lines = process(code, tmp_path).stdout.splitlines()
    assert len(lines) == 3 and lines[-1] == "0"


def test_every_directory_once(tmp_path):
    make_run(tmp_path)
    runs, others = list_runs([tmp_path, Path(os.path.relpath(tmp_path)), tmp_path])
    assert len(runs) == 1 and others == []
