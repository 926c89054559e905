"""The code of the GPU benchmark, run on a CPU with small sizes."""

import json
import time

import pytest
import torch
from benchmarks._plans import PLANS
from benchmarks._tf32 import tf32_off
from benchmarks._timing import clock_for, interleave

from benchmarks import _gpu_cases, gpu


def run(tmp_path, *cases, more=()):
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path), *more]
    gpu.main([*options, "--cases", *cases])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt", "gpt-bf16"])
def test_plans_are_measured_and_compared_with_the_loop(tmp_path, case):
    result = run(tmp_path, case)["cases"][case]
    assert result["bf16"] is case.endswith("bf16")
    assert set(PLANS) < set(result["results"])
    assert result["results"]["loop"]["ratio"]["median"] > 0
    largest = 0.05 if result["bf16"] else 1e-4
    assert set(result["gram_difference"]) == {"as configured", "without TF32"}
    assert all(0 <= d < largest for d in result["gram_difference"].values())


def test_a_failing_case_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(options):
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setitem(_gpu_cases.CASES, "conv", fail)
    cases = run(tmp_path, "conv", "waits-mlp")["cases"]
    assert cases["conv"]["failure"] == "RuntimeError: no such luck"
    assert cases["waits-mlp"]["failure"] == "needs a CUDA device"


def test_cases_measured_before_stay(tmp_path):
    run(tmp_path, "waits-mlp")
    assert list(run(tmp_path, "waits-gpt")["cases"]) == ["waits-mlp", "waits-gpt"]


@pytest.mark.slow
def test_memory_case(tmp_path):
    (workload,) = run(tmp_path, "memory")["cases"]["memory"]["workloads"]
    assert workload["results"]["loop"]["peak_bytes"] > 0


def test_tf32_is_switched_off_and_back():
    def state():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = state()
    with tf32_off():
        assert state() == (False, False)
    assert state() == before


def test_compiled_steps(tmp_path):
    case = run(tmp_path, "compiled-mlp")["cases"]["compiled-mlp"]
    assert set(case["results"]) == {"plain", "step", "graph"}
    assert case["first_call"]["graph"] > 0
    assert case["ratios"]["step / graph"]["median"] > 0


def test_sam_along_the_gradient_of_each_row_by_every_plan(tmp_path):
    results = run(tmp_path, "sam-rows-mlp")["cases"]["sam-rows-mlp"]["results"]
    assert set(results) == {"plain", "SAM", *(f"{plan}, SAM per row" for plan in PLANS)}
    assert all(result["failure"] is None for result in results.values())


def test_checkpointed_models_by_every_plan_that_takes_them(tmp_path):
    case = run(tmp_path, "checkpointed-gpt")["cases"]["checkpointed-gpt"]
    assert {"auto", *PLANS} < set(case["results"])
    for name in ("plain", "plain, no checkpoints", "fused, no checkpoints", "auto", "loop"):
        assert case["results"][name]["failure"] is None
    refused = [r["failure"] for name, r in case["results"].items() if r["failure"]]
    assert all("checkpointing" in reason or "saved tensor hooks" in reason for reason in refused)


def test_cases_after_the_time_limit_are_named_and_earlier_results_stay(
    tmp_path, monkeypatch, capsys
):
    def sleep(options):
        time.sleep(60)

    run(tmp_path, "waits-gpt")
    monkeypatch.setitem(_gpu_cases.CASES, "conv", sleep)
    monkeypatch.setitem(_gpu_cases.CASES, "waits-gpt", sleep)
    cases = run(tmp_path, "conv", "waits-gpt", more=("--minutes", "0.002"))["cases"]
    assert cases["conv"]["failure"] == "not measured: the time was over"
    assert cases["waits-gpt"]["failure"] == "needs a CUDA device"
    assert "Not measured in 0.002 minutes: conv waits-gpt" in capsys.readouterr().out


def test_no_round_begins_after_the_share_of_a_case():
    calls = []
    contenders = {"one": lambda: calls.append(1)}
    found = interleave(contenders, 5, clock_for(torch.device("cpu")), until=0.0)
    assert len(found.seconds["one"]) == 1
    assert len(calls) >= 2  # one to warm up
