"""The fused-against-looped benchmark, and the measures of time and memory of all benchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks._by_hand import by_hand
from benchmarks._memory import peak_bytes
from benchmarks._models import TASKS, Task, images
from benchmarks._report import chart, table
from benchmarks._setting import Setting
from benchmarks._timing import Spread, interleave, rotations
from rich.console import Console
from torch import nn

from benchmarks import fused_vs_looped

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KB = 1024


@pytest.mark.slow
def test_script_measures_every_plan_and_writes_table_json_and_chart(tmp_path):
    script = [sys.executable, ROOT / "benchmarks" / "fused_vs_looped.py"]
    options = ["--quick", "--models", "mlp", "--out", tmp_path]
    done = subprocess.run([*script, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loop" in done.stdout and "vmap" in done.stdout

    written = json.loads((tmp_path / "fused_vs_looped-cpu.json").read_text())
    assert written["torch"] == torch.__version__
    assert written["device_name"] and written["date"] and written["threads"] >= 1
    (workload,) = written["workloads"]
    assert workload["microbatches"] * workload["samples_per_microbatch"] == 128
    step, published = fused_vs_looped.STEP, fused_vs_looped.PUBLISHED
    ours = (*fused_vs_looped.PLANS, step, fused_vs_looped.BY_HAND)
    assert list(workload["results"]) == ["plain", *ours, published]
    assert workload["ratios"][f"{published} / {step}"]["median"] > 0
    for result in workload["results"].values():
        assert result["failure"] is None
        for spread in (result["seconds"], result["ratio"]):
            assert 0 < spread["min"] <= spread["lower_quartile"] <= spread["median"]
            assert spread["median"] <= spread["upper_quartile"] <= spread["max"]
    plain, loop = workload["results"]["plain"], workload["results"]["loop"]
    assert plain["ratio"]["max"] == 1
    # One gradient and eight of them; what comes on top is activations and scratch space.
    gradient = 4 * workload["parameters"]
    assert gradient < plain["peak_bytes"] < 2 * gradient
    assert 8 * gradient < loop["peak_bytes"] < 24 * gradient
    assert (tmp_path / "fused_vs_looped-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("microbatches", "samples"), [(4, 3), (6, 1)])
def test_by_hand_computes_what_a_plan_computes(microbatches, samples, float64):
    setting = Setting.of(TASKS["mlp"], microbatches * samples, CPU)
    plan, _, _ = setting.filtered(microbatches, "fused")()
    found = by_hand(setting, microbatches)()
    assert found.keys() == plan.keys()
    for name, leaf in plan.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-10, atol=1e-14)


class Moody(nn.Linear):
    """Looks at its data to decide what to do, which vmap cannot."""

    def forward(self, x):
        return super().forward(x.flatten(1)) * (2 if x.sum() > 0 else 1)


def test_a_plan_that_refuses_is_reported_in_its_cell(tmp_path):
    task = Task("Moody", lambda: Moody(3072, 10), images(10), ((2, 3),))
    workload = fused_vs_looped.measure("moody", task, (2, 3), 2, CPU)
    assert workload.results["loop"].ratio is not None
    assert workload.results["vmap"].seconds is None
    assert workload.results["vmap"].failure.startswith("RuntimeError: ")

    console = Console(record=True, width=200, file=(tmp_path / "table").open("w"))
    table([workload], ("loop", "vmap"), "", console)
    console.file.close()
    assert workload.results["vmap"].failure[:40] in console.export_text()
    chart([workload], ("loop", "vmap"), "", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").exists()


# Timing


def test_every_contender_takes_every_place():
    assert list(rotations(["a", "b", "c"], 4)) == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_warm_up_is_run_and_not_counted():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}

    def clock(contender):
        contender()
        return float(len(calls))

    timings = interleave(contenders, 2, clock, warmup=1)
    assert "".join(calls) == "ab" + "ba" + "ab"
    assert timings.seconds == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_ratios_are_taken_round_by_round():
    # The machine slows down from round to round, b is always twice as slow as a.
    seconds = iter([1, 2, 20, 10, 100, 200])
    contenders = {"a": lambda: None, "b": lambda: None}
    timings = interleave(contenders, 3, lambda _: float(next(seconds)), warmup=0)
    assert timings.ratio_to("a", "b") == Spread(2, 2, 2, 2, 2)
    assert timings.seconds_of("a").median == 10


def test_spread_is_median_quartiles_and_ends():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 9.0]) == Spread(4, 2, 5, 1, 9)
    assert Spread.of([3.0]) == Spread(3, 3, 3, 3, 3)


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (ValueError("no such thing\nat all"), "ValueError: no such thing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_a_failing_contender_leaves_the_others_alone(error, reported):
    calls = []

    def fail():
        calls.append("fail")
        raise error

    contenders = {"fails": fail, "works": lambda: calls.append("works")}
    timings = interleave(contenders, 3, lambda contender: contender() or 1.0)
    assert timings.failures == {"fails": reported}
    assert timings.seconds == {"works": [1.0] * 3}
    assert calls.count("fail") == 1


# Memory


def kilobytes(count):
    return torch.empty(count * KB, dtype=torch.uint8)


def test_peak_is_what_was_alive_at_one_time():
    def computation():
        first = kilobytes(4)
        second = kilobytes(8)
        del first
        third = kilobytes(2)  # 12 at the peak; 14 in all, 10 at the end
        return second, third

    assert peak_bytes(computation, CPU) == 12 * KB


def test_result_counts_and_what_was_there_before_does_not():
    before = kilobytes(1024)
    assert peak_bytes(lambda: before[:512].clone(), CPU) == 512
    assert peak_bytes(lambda: before.zero_(), CPU) == 0
    assert peak_bytes(lambda: kilobytes(3), CPU) == 3 * KB


def test_memory_that_autograd_saves_and_lets_go_is_seen():
    x = torch.ones(256 * KB, requires_grad=True)  # 1 MB

    def computation(steps):
        y = x
        for _ in range(steps):
            y = y.exp()  # saves its result
        y.backward(torch.ones_like(y))
        x.grad = None

    # Every further step keeps one more result alive until the backward pass reaches it.
    peaks = [peak_bytes(lambda n=n: computation(n), CPU) for n in (2, 3, 4)]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] == x.numel() * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu():
    cuda = torch.device("cuda")

    def computation():
        first = torch.empty(4 * KB * KB, dtype=torch.uint8, device=cuda)
        del first
        return torch.empty(2 * KB * KB, dtype=torch.uint8, device=cuda)

    assert peak_bytes(computation, cuda) == 4 * KB * KB
