"""The example of texts with wrong labels: its data, its loop, its trainer and its study."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from _newsgroup_tables import install_all

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "finetune"
FILES = sorted(FOLDER.glob("*.py"))
STARTED = {"loop", "trainer", "study", "plot"}
RUN = ROOT / "tests" / "support" / "_finetune_run.py"
TINY = {"data": "made-up", "steps": 4, "every": 2, "batch": 8, "length": 10, "words": 200}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Return a function that imports a file of the example, in an empty folder."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for path in FILES:  # the names are of this folder only
        sys.modules.pop(path.stem, None)


@pytest.fixture
def package(load, tmp_path, monkeypatch):
    """Install small tables of the newsgroups."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install_all(tmp_path, load("texts").GROUPS, each=100)


# --- The files ---


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_short_and_says_how_to_start_it(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 120
    assert lines[0].startswith('"""')
    if path.stem in STARTED:
        docstring = path.read_text().split('"""')[1]
        assert re.search(rf"^    python examples/finetune/{path.name}", docstring, re.MULTILINE)
        assert 'pip install "gradfilter[' in docstring
        assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]


def test_the_page_lists_all_files():
    page = (ROOT / "docs/finetune.md").read_text()
    listed = re.findall(r"\.\./examples/finetune/(\w+)\.py\)", page)
    assert {*listed} == {path.stem for path in FILES}


# --- The data ---


def test_wrong_labels_and_corrupted_sequences_are_as_many_as_asked_for(load):
    data = load("data").load("made-up", 3, 0.4, 0.6, length=12, words=300)
    for part in (data.train, data.validation):
        assert part.wrong.double().mean() == pytest.approx(0.4, abs=0.07)
        shares = part.kinds.bincount(minlength=4).double() / len(part)
        assert shares.tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.07)
        assert torch.equal(part.bad, part.wrong | (part.kinds >= 2))  # shuffled words are not bad
    assert len(data.clean) == 50
    assert not data.clean.bad.any() and not data.test.bad.any()
    mask = data.train.inputs["attention_mask"]
    assert torch.equal(mask == 0, data.train.inputs["input_ids"] == 0) and mask[:, 0].all()


def test_a_wrong_label_is_wrong_and_a_seed_changes_everything_but_the_test(load):
    draws = [(1, 0.5), (1, 0.0), (2, 0.5)]
    noisy, right, other = (
        load("data").load("made-up", seed, wrong, 0.0, length=12, words=300)
        for seed, wrong in draws
    )
    differ = noisy.train.inputs["labels"] != right.train.inputs["labels"]
    assert torch.equal(differ, noisy.train.wrong) and differ.any()
    assert not torch.equal(other.train.wrong, noisy.train.wrong)
    assert torch.equal(other.test.inputs["labels"], noisy.test.inputs["labels"])


def test_words_of_the_held_out_texts_only_are_unknown(load, monkeypatch):
    data = load("data")
    spelled = lambda n: "".join(chr(97 + int(digit)) for digit in str(n))
    of = lambda start: [f"all {spelled(start + i)}" for i in range(100)]
    labels = np.arange(100) % 2
    monkeypatch.setattr(data, "sources", lambda name: ((of(0), labels), (of(500), labels), []))
    found = data.load("made-up", 0, 0.0, 0.0, length=2, words=1000)
    seconds = {
        name: {*getattr(found, name).inputs["input_ids"][:, 1].tolist()}
        for name in ("train", "clean", "validation", "test")
    }
    assert seconds["validation"] == seconds["test"] == {1}
    assert len(seconds["train"] | seconds["clean"]) == 80 == found.words - 3


def test_corrupted_texts_are_what_they_are_called(load):
    texts, draw = load("texts"), np.random.default_rng(0)
    words = "one two three four five six seven"
    shuffled = texts.corrupt(words, "shuffled", [], draw)
    assert shuffled != words and Counter(shuffled.split()) == Counter(words.split())
    assert texts.corrupt(words, "foreign", ["dober dan"], draw) == "dober dan"
    assert texts.corrupt(words, "boilerplate", [], draw) == texts.NOTICE
    assert texts.corrupt(words, "intact", [], draw) == words


def test_an_order_is_of_whole_shuffled_passes(load):
    order = load("data").order
    taken = order(10, 4, 5, seed=0).flatten()
    assert taken[:10].sort()[0].tolist() == [*range(10)] == taken[10:].sort()[0].tolist()
    assert torch.equal(order(10, 4, 3, seed=0), order(10, 4, 5, seed=0)[:3])


# --- The loop and the trainer ---


def test_the_loop_learns_a_small_table_in_the_format_of_the_package(load, package, capsys):
    sizes = "--steps 60 --every 30 --length 12 --words 90 --lr 0.01"
    load("loop").main(sizes.split())
    numbers = r"step (\d+), .*test accuracy ([\d.]+), train loss ([\d.]+)"
    found = re.findall(numbers, capsys.readouterr().out)
    assert [step for step, _, _ in found] == ["30", "60"]
    assert float(found[-1][1]) > 0.8 and float(found[-1][2]) < 0.8 * float(found[0][2])


@pytest.mark.parametrize("rule", ["consensus", "reference"])
def test_a_rule_with_weights_reports_what_it_accepts(load, rule):
    setting = load("setting").Setting(rule=rule, wrong=0.4, **TINY)
    data = setting.load()
    lines = [line for line, _ in load("loop").train(setting, data, setting.model(data))]
    assert len(lines) == 2
    assert all(0 <= line[f"accepted_{kind}"] <= 1 for line in lines for kind in ("bad", "good"))


@pytest.mark.parametrize("rule", ["consensus", "reference", "spike"])
def test_the_trainer_takes_the_steps_of_the_loop(load, rule, tmp_path, capsys):
    pytest.importorskip("transformers")
    setting = load("setting").Setting(rule=rule, wrong=0.3, **TINY)
    torch.set_default_dtype(torch.float64)
    try:
        data = setting.load()
        *_, (line, params) = load("loop").train(setting, data, setting.model(data))
        model = setting.model(data)
        load("trainer").trainer_of(setting, data, model, str(tmp_path)).train()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-10, atol=1e-10)
    assert f"step 4, test loss {line['test_loss']:.4g}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("loop", "consensus"), ("loop", "reference"), ("loop", "spike"), ("trainer", "reference")],
)
def test_two_processes_have_the_parameters_of_one(kind, rule, tmp_path):
    if kind == "trainer":
        pytest.importorskip("transformers")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for name, start in {"one": [], "two": launch}.items():
        command = [sys.executable, *start, RUN, FOLDER, kind, rule, tmp_path / f"{name}.pt"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        found[name] = [torch.load(path) for path in sorted(tmp_path.glob(f"{name}.?"))]
    [one], (two, other) = found["one"], found["two"]
    for name, p in one.items():
        assert p.dtype == torch.float64
        assert torch.equal(two[name], other[name])
        torch.testing.assert_close(two[name], p, rtol=1e-10, atol=1e-10)


# --- The study ---


def test_the_best_rate_is_not_at_an_end_of_those_tried(load):
    study, setting = load("study"), load("setting").Setting()
    asked = []

    def rising(one):
        asked.append(one.lr)
        assert one.seed == study.SEARCH_SEED not in study.SEEDS
        return {"validation": min(one.lr, 0.008)}

    best, tried = study.best_rate(rising, setting)
    assert best == 0.008 and {*map(float, tried)} == {0.002, 0.004, 0.008, 0.016} == {*asked}
    best, tried = study.best_rate(lambda one: {"validation": -one.lr}, setting)
    assert best == study.LADDER[0] and len(tried) == 5


def test_a_summary_compares_seed_by_seed_and_at_equal_time(load):
    curves = lambda *finals: [
        {
            "step": [50, 100],
            "test_accuracy": [f - 0.1, f],
            "test_loss": [2.0, 1.0],
            "accepted_bad": [0.5, float("nan")],  # no bad sequence
        }
        for f in finals
    ]
    found = load("report").summary(curves(0.6, 0.8), curves(0.5, 0.6), ratio=1.9)
    assert found["accuracy"]["mean"] == pytest.approx(0.7)
    assert found["over_plain"]["values"] == pytest.approx([0.1, 0.2])
    assert found["equal_time"]["steps"] == 50
    assert found["equal_time"]["over_plain"]["mean"] == pytest.approx(0.05)
    assert [{*point} for point in found["curves"]] == [{"step", "test_accuracy", "test_loss"}] * 2
    means = [point["test_accuracy"]["mean"] for point in found["curves"]]
    assert means == pytest.approx([0.6, 0.7])
    assert (
        load("report").summary(curves(0.6, 0.8), curves(0.5, 0.6), 1.0)["equal_time"]["steps"]
        == 100
    )


@pytest.mark.slow
def test_a_study_resumes_and_a_cell_of_it_is_repeated_by_the_loop(
    load, monkeypatch, capsys, tmp_path
):
    study, rules, done = load("study"), load("rules"), load("done")
    for name in ("spike", "clip", "reference"):
        monkeypatch.delitem(rules.RULES, name)
    monkeypatch.setattr(study, "CASES", {"wrong 0.4": {"wrong": 0.4}})
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    base = load("setting").Setting(**TINY)
    options = ["--out", "out", "--rounds", "1"]
    study.main(options, base)
    first = json.loads(Path("out/finetune-cpu.json").read_text())
    lines = Path("runs/finetune.jsonl").read_text().splitlines()
    Path("runs/finetune.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    trained = []
    monkeypatch.setattr(done, "trained", lambda s, of=done.trained: trained.append(s) or of(s))
    study.main(options, base)
    second = json.loads(Path("out/finetune-cpu.json").read_text())
    assert len(trained) == 1  # the one that was missing
    assert (
        second["results"]["wrong 0.4"]["consensus"]["accuracy"]
        == (first["results"]["wrong 0.4"]["consensus"]["accuracy"])
    )
    cell = first["results"]["wrong 0.4"]["consensus"]
    sizes = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    capsys.readouterr()
    rate = str(cell["learning_rate"])
    load("loop").main(
        [*sizes, *["--rule", "consensus", "--wrong", "0.4", "--seed", "1", "--lr"], rate]
    )
    printed = re.findall(r"test accuracy ([\d.]+)", capsys.readouterr().out)[-1]
    assert float(printed) == pytest.approx(cell["accuracy"]["values"][1], abs=1e-4)


def test_the_committed_results_are_of_the_rules_and_cases_of_the_study(load):
    study, report = load("study"), load("report")
    found = json.loads((ROOT / "benchmarks/results/finetune-cpu.json").read_text())
    assert found["cases"] == study.CASES and found["seeds"] == list(study.SEEDS)
    assert {*found["results"]} == {*study.CASES}
    for case in found["results"].values():
        assert {*case} == {*load("rules").RULES}
        for each in case.values():
            assert len(each["accuracy"]["values"]) == len(study.SEEDS)
            repeated = report.difference(
                each["accuracy"]["values"], case["plain"]["accuracy"]["values"]
            )
            assert each["over_plain"] == repeated
