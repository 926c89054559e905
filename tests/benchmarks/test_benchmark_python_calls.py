"""Counts of Python calls and instructions: what is counted, and an upper bound for one step."""

import json

import torch
from benchmarks._models import TASKS
from benchmarks._setting import Setting

from benchmarks import python_calls


def test_calls_and_instructions_are_counted():
    def inner(n):
        return n + 1

    def step():
        return [*map(inner, range(5))]

    assert python_calls.count_calls(step) == {f"{__name__}.py {inner.__qualname__}": 5}
    once = python_calls.count_instructions(step)
    assert once == python_calls.count_instructions(step) > 5 * 3


def test_the_counts_of_a_step_are_the_same_every_time():
    setting = Setting.of(TASKS["mlp"], 16, torch.device("cpu"))

    def step():
        setting.filtered(2, "fused")()

    first, second = python_calls.count(step), python_calls.count(step)
    assert first == second
    assert sum(first.calls_of.values()) == first.calls > first.calls_of["gradfilter"] > 0


def test_a_filtered_step_of_the_mlp_makes_few_calls():
    """As every call counts for a small step, it is 868 with Python 3.11 and torch 2.14."""
    steps = python_calls.contenders(TASKS["mlp"], 8, 16, torch.device("cpu"))
    assert python_calls.count(steps["filter"]).calls < 1000


def test_the_file_has_earlier_counts_next_to_the_present_ones(tmp_path, capsys):
    earlier, now = tmp_path / "earlier", tmp_path / "now"
    python_calls.main(["--quick", "--out", str(earlier)])
    before = earlier / "python_calls-cpu.json"
    python_calls.main(["--quick", "--out", str(now), "--before", str(before)])
    written = json.loads((now / "python_calls-cpu.json").read_text())
    assert written["benchmark"] == "python_calls" and written["quick"]
    (workload,) = written["workloads"]
    assert workload["model"] == "mlp"
    assert list(workload["counts"]) == ["plain", "filter", "step", "SAM per row"]
    assert workload["before"] == json.loads(before.read_text())["workloads"][0]["counts"]
    assert "SAM per row" in capsys.readouterr().out
