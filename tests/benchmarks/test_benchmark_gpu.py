"""The code of the GPU benchmark, run on a CPU with small sizes."""

import json

import pytest
import torch
from benchmarks._plans import PLANS
from benchmarks._tf32 import tf32_off

from benchmarks import _gpu_cases, gpu


def run(tmp_path, *cases):
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    gpu.main([*options, "--cases", *cases])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


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
