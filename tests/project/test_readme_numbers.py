"""The README's tables of measurements are those of the files that it links to."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def table(heading):
    """The cells below a heading line: {row: {column: text}}."""
    lines = README[README.index(heading) :].splitlines()
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]
    body = rows[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in body}


def workloads(benchmark):
    return json.loads((ROOT / f"benchmarks/results/{benchmark}-cpu.json").read_text())["workloads"]


def rounded(value, text):
    """The value with as many digits as the text has."""
    return f"{value:.{len(text.partition('.')[2])}f}"


def check(text, value, where):
    assert text == rounded(value, text), where


def test_fused_and_looped():
    found = table("| model, (M, B) |")
    assert len(found) == 10
    sized = "{title}, ({microbatches}, {samples_per_microbatch})"
    measured = {sized.format(**workload): workload for workload in workloads("fused_vs_looped")}
    for label, cells in found.items():
        workload = measured[label]
        for name, text in cells.items():
            if text != "–":
                check(text, workload["results"][name]["ratio"]["median"], (label, name))


def test_per_sample():
    found = table("| over plain |")
    mlp, lenet = workloads("per_sample")
    assert set(found) == set(mlp["results"]) - {"plain"}
    for name, cells in found.items():
        for column, workload in (("MLP", mlp), ("LeNet", lenet)):
            check(cells[column], workload["results"][name]["ratio"]["median"], (name, column))


def test_sharpness():
    found = table("| over torch's plain step |")
    names = {
        "SAM by hand in torch": "torch, SAM by hand",
        "gradfilter: plain": "plain",
        "gradfilter: SAM": "SAM",
        "gradfilter: GSAM": "GSAM",
    }
    assert set(found) == set(names)
    for label, cells in found.items():
        for column, text in cells.items():
            model, m = column.split(", M = ")
            ending = f"M = {m}" + (", in place" if m == "1" else ", filtered, in place")
            titles = {w["title"]: w for w in workloads("sharpness")}
            (workload,) = (
                w for t, w in titles.items() if t.startswith(model) and t.endswith(ending)
            )
            check(text, workload["results"][names[label]]["ratio"]["median"], (label, column))


def test_distributed():
    found = table("| over DDP |")
    models = {
        "MLP, 0.1 M": "mlp-0.1M-ranks-2",
        "MLP, 1.9 M": "mlp-2M-ranks-2",
        "MLP, 11 M": "mlp-11M-ranks-2",
        "ResNet18, 11 M": "resnet18-ranks-2",
    }
    measured = {w["model"]: w for w in workloads("distributed")}
    for label, cells in found.items():
        sent = measured["resnet18-ranks-2"]["counted_bytes"]
        check(cells.pop("bytes"), sent[label] / sent["DDP"], label)
        for column, text in cells.items():
            ratio = measured[models[column]]["results"][label]["ratio"]
            check(text, ratio["median"], (label, column))


@pytest.mark.parametrize(
    ("pattern", "run", "name"),
    [
        (r"is ([\d.]+) ± ([\d.]+) % for\s+plain", "sgd", "test_accuracy"),
        (r"learns (\d+) %", "sgd", "memorised"),
        (r"([\d.]+) ± ([\d.]+) % with agreement", "agree", "test_accuracy"),
        (r"microbatches\s+\((\d+) % learnt\)", "agree", "memorised"),
        (r"([\d.]+) ± ([\d.]+) % with per-sample", "consensus", "test_accuracy"),
        (r"consensus \((\d+) % learnt\)", "consensus", "memorised"),
    ],
)
def test_the_demo(pattern, run, name):
    path = ROOT / "benchmarks/results/demo-digits-seeds-5.json"
    said = re.search(pattern, README).groups()
    measured = json.loads(path.read_text())["summary"][run][name]
    for text, key in zip(said, ("mean", "sd"), strict=False):
        check(text, 100 * measured[key], (run, name))
