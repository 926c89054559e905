"""The command that runs all benchmarks: its parts, its files of results, and its page."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from benchmarks._collected import collect, slug
from benchmarks._command import RESULTS
from benchmarks._dots import Dot, Dots, Panel, draw, short
from benchmarks._page import page, write_page
from benchmarks._parts import PARTS, Part, command
from benchmarks._tables import faster

from benchmarks import __main__ as everything
from benchmarks import _collected, gpu, memory, update

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def no_process():
    """A way to run parts that runs nothing, and what it was called with."""
    lines = []

    def run(line):
        lines.append([str(word) for word in line])
        return 0

    return run, lines


def in_this_process(line):
    """A part's command without a process of its own, which takes seconds to begin."""
    module, arguments = line[2], list(line[3:])
    assert line[:2] == [sys.executable, "-m"]
    try:
        {"benchmarks.memory": memory, "benchmarks.update": update}[module].main(arguments)
    except ZeroDivisionError:
        return 1
    return 0


# What is run


def names_run(no_process, *arguments):
    run, lines = no_process
    everything.main(list(arguments), run)
    return [name for name in PARTS for line in lines if line[2:] and is_part(name, line)]


def is_part(name, line):
    part = PARTS[name]
    called = f"benchmarks.{part.script}" == line[2]
    return called and all(word in line for word in part.arguments)


TIMED = [name for name, part in PARTS.items() if not part.study and not part.only_cuda]
STUDIES = [name for name, part in PARTS.items() if part.study]


def test_every_script_is_a_part():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    tools = {"cited"}  # checks numbers, and measures none
    assert {s for s in scripts if not s.startswith("_")} - tools == {
        part.script for part in PARTS.values()
    }


def test_studies_run_when_they_are_asked_for(no_process, tmp_path):
    out = ("--out", str(tmp_path))
    empty(tmp_path)
    assert names_run(no_process, *out) == TIMED
    no_process[1].clear()
    assert names_run(no_process, *out, "--studies") == TIMED + STUDIES
    no_process[1].clear()
    assert names_run(no_process, *out, "--only", "label_noise", "memory") == [
        "memory",
        "label_noise",
    ]


def empty(folder):
    """A part without contests, so that there is something to collect."""
    facts = json.loads((RESULTS / "memory-cpu.json").read_text()) | {"workloads": []}
    (folder / "memory-cpu.json").write_text(json.dumps(facts))


def test_a_quick_run_is_small_and_goes_elsewhere(no_process, tmp_path, monkeypatch):
    empty(tmp_path)
    monkeypatch.setattr(everything.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in [*RESULTS.iterdir(), *DOCS.iterdir()]}
    assert names_run(no_process, "--quick") == [
        *TIMED,
        "double_descent_features",
        "double_descent_widths",
    ]
    for line in no_process[1]:
        assert "--quick" in line and line[line.index("--out") + 1] == str(tmp_path)
    assert (tmp_path / "cpu.json").exists() and (tmp_path / "benchmarks.md").exists()
    after = {path: path.stat().st_mtime_ns for path in [*RESULTS.iterdir(), *DOCS.iterdir()]}
    assert before == after


def test_commands():
    out = Path("somewhere")
    line = command(PARTS["update"], device="cuda", out=out, rounds=7)
    assert line[1:] == [
        *("-m", "benchmarks.update", "--out", "somewhere"),
        *("--device", "cuda", "--rounds", "7"),
    ]
    line = command(PARTS["default_rule"], device="cpu", out=out, rounds=7)  # no such options
    assert line[1:] == ["-m", "benchmarks.label_noise", "--out", "somewhere", "--part", "default"]
    assert command(PARTS["distributed"], device="cpu", out=out, quick=True)[-4:] == [
        *("--worlds", "2"),
        *("--device", "cpu"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--only", "memory", "rule_search"], "rule_search has no quick version"),
        (["--only", "gpu"], "gpu does not run with --device cpu"),
        (["--device", "cuda", "--only", "label_noise"], "label_noise does not run with"),
    ],
)
def test_what_cannot_run_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        everything.main(arguments)
    assert message in capsys.readouterr().err


def test_a_gpu_is_needed_for_a_gpu(no_process, monkeypatch):
    monkeypatch.setattr(everything.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="Expected a CUDA device, found none"):
        everything.main(["--device", "cuda"], no_process[0])
    assert not no_process[1]


def test_what_runs_on_a_gpu(no_process, tmp_path, monkeypatch):
    """The command and the folder, with a device that is not there."""
    facts = json.loads((RESULTS / "memory-cpu.json").read_text()) | {"device_name": "NVIDIA H200"}
    monkeypatch.setattr(everything.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(everything, "machine", lambda device: facts)
    parts = tmp_path / "nvidia-h200"
    parts.mkdir()
    (parts / "memory-cuda.json").write_text(json.dumps(facts))
    ran = names_run(no_process, "--device", "cuda", "--out", str(tmp_path))
    assert ran == [*TIMED, "gpu"]
    for line in no_process[1]:
        assert line[line.index("--device") + 1] == "cuda"
        assert line[line.index("--out") + 1] == str(parts)
    assert list(json.loads((tmp_path / "nvidia-h200.json").read_text())["parts"]) == ["memory"]
    assert "--only memory --device cuda" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.slow
def test_one_failing_part_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(memory, "measure", fail)
    monkeypatch.setattr(update.torchvision.models, "resnet18", lambda: update.nn.Linear(3, 4))
    arguments = ["--quick", "--rounds", "2", "--out", str(tmp_path), "--only", "memory", "update"]
    assert everything.main(arguments, in_this_process) == 1
    assert "failed, exit code 1" in capsys.readouterr().out
    collected = json.loads((tmp_path / "cpu.json").read_text())
    assert list(collected["parts"]) == ["update"] and collected["device"] == "cpu"
    cell = collected["parts"]["update"]["workloads"][0]["results"]["ours"]
    assert list(cell) == ["ratio", "seconds", "peak_bytes"]
    assert list(cell["ratio"]) == ["median", "lower_quartile", "upper_quartile"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "### Update rules and clipping" in text and "How much memory" not in text
    assert "a quick run: its times mean nothing" in text
    assert "(update-cpu.json)" not in text and "(./update-cpu.json)" in text
    assert (tmp_path / "pictures" / "benchmarks-cpu-update.svg").exists()


def test_a_part_is_a_process_and_its_exit_code_counts(monkeypatch, tmp_path, capfd):
    empty(tmp_path)
    monkeypatch.setitem(everything.PARTS, "memory", Part("no_such_script"))
    assert everything.main(["--only", "memory", "--out", str(tmp_path)]) == 1
    assert "No module named benchmarks.no_such_script" in capfd.readouterr().err


# One file per device


def test_what_is_committed_is_collected_from_its_parts(tmp_path):
    for path in RESULTS.glob("*-cpu.json"):
        shutil.copy(path, tmp_path)
    found = collect(tmp_path, "cpu", "any")
    assert found.name == "cpu.json"
    assert found.read_text() == (RESULTS / "cpu.json").read_text()


def test_a_part_whose_file_is_gone_stays(tmp_path):
    shutil.copy(RESULTS / "cpu.json", tmp_path)
    before = (tmp_path / "cpu.json").read_text()
    assert collect(tmp_path, "cpu", "any").read_text() == before


def test_nothing_to_collect(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"at least one part .* Run a part first"):
        collect(tmp_path, "cpu", "any")


def test_a_device_names_its_file():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert _collected.file_of_device("cuda", "NVIDIA H200") == "nvidia-h200.json"
    assert _collected.file_of_device("cpu", "Some Processor") == "cpu.json"


# The page


def test_the_committed_page_is_what_its_files_give():
    text, charts = page(RESULTS, DOCS)
    assert text == (DOCS / "benchmarks.md").read_text()
    pictures = {path.name for path in (DOCS / "pictures").glob("benchmarks-*")}
    assert pictures == charts.keys()


def test_the_heading_names_every_processor_of_the_parts():
    text, _ = page(RESULTS, DOCS)
    (heading,) = (line for line in text.splitlines() if line.startswith("## "))
    parts = json.loads((RESULTS / "cpu.json").read_text())["parts"].values()
    assert {part["machine"]["device_name"] for part in parts} == set(
        heading.removeprefix("## ").rpartition(", ")[0].split(" and ")
    )


def test_the_page_links_only_to_what_is_there():
    text, _ = page(RESULTS, DOCS)
    targets = {part.split(")")[0] for part in text.split("](")[1:]}
    assert len(targets) > 20
    assert all((DOCS / target).exists() for target in targets)


def test_the_page_is_the_same_every_time(tmp_path):
    folders = []
    for name in ("a", "b"):
        results = tmp_path / name / "results"
        results.mkdir(parents=True)
        contents = json.loads((RESULTS / "cpu.json").read_text())
        kept = ("growth", "double_descent_features", "double_descent_widths")
        contents["parts"] = {part: contents["parts"][part] for part in kept}
        (results / "cpu.json").write_text(json.dumps(contents))
        folders.append(write_page(results, tmp_path / name).parent)
    found = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders
    ]
    assert found[0] == found[1] and len(found[0]) == 4  # a page, two pictures, the results


def test_numbers_of_the_page_are_those_of_the_file():
    text, charts = page(RESULTS, DOCS)
    part = json.loads((RESULTS / "per_sample-cpu.json").read_text())
    for contest in part["workloads"]:
        for name, result in contest["results"].items():
            if name == "plain":
                continue
            ratio = result["ratio"]
            median, low, high = (
                short(ratio[key]) for key in ("median", "lower_quartile", "upper_quartile")
            )
            (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
            bold = f"**{median}**" if name.startswith("gradfilter") else median
            assert f" {bold} [{low}, {high}] |" in line
    drawn = {dot.value[1] for panel in charts["benchmarks-cpu-per_sample.svg"].panels
             for dot in panel.dots}  # fmt: skip
    assert part["workloads"][0]["results"]["opacus: rows"]["ratio"]["median"] in drawn


@pytest.mark.slow
def test_what_a_gpu_adds(tmp_path):
    """The cases of a GPU, tried on a CPU, under the name of a device."""
    cases = ["gpt", "gpt-bf16", "waits-mlp", "captured-mlp"]
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    gpu.main([*options, "--cases", *cases])
    parts = tmp_path / "some-gpu"
    parts.mkdir()
    (tmp_path / "gpu-cpu.json").rename(parts / "gpu-cuda.json")
    collect(tmp_path, "cuda", "Some GPU")
    text = write_page(tmp_path, tmp_path).read_text()
    assert "GPT of that size, T = 8, bfloat16, (2, 2)" in text
    assert "- none for waits-mlp: `needs a CUDA device`" in text
    assert "`python -m benchmarks --only gpu --device cuda`" in text
    assert (tmp_path / "pictures" / "benchmarks-some-gpu-gpu.svg").exists()


def test_a_chart_without_a_value_says_why(tmp_path):
    dots = [Dot("there", (1.0, 2.0, 3.0), ours=True), Dot("not there", None, note="no luck")]
    draw(Dots([Panel("one", dots)], 2, "axis"), tmp_path / "a" / "chart.svg")
    assert ">no luck</text>" in (tmp_path / "a" / "chart.svg").read_text()


def contest(**medians):
    quartiles = ("lower_quartile", "median", "upper_quartile")
    return {
        "title": "some model",
        "results": {name: {"ratio": dict.fromkeys(quartiles, m)} for name, m in medians.items()},
    }


def test_who_is_ahead_of_ours_is_said():
    contests = [contest(ours=2.0, theirs=1.5, close=1.999, slow=3.0), {**contest(), "results": {}}]
    others = ("theirs", "close", "slow", "absent")
    assert faster(contests, [("ours", others)]) == (
        "Faster than ours:\n\n- some model: `theirs` 1.50; `ours` 2.00"
    )
    assert faster(contests, [("ours", ["slow"])]) == "No other contender is faster."


def test_studies_say_how_many_seeds_they_had():
    contents = {"lines": [{"seed": 1}, {"seed": 0}, {"seed": 1}]}
    assert _collected.shortened(contents)["seeds"] == [0, 1]
