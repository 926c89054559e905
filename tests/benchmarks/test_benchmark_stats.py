"""The benchmark of Jacobians: all candidates compute equal numbers; the command writes them."""

import json

import pytest
import torch

from benchmarks import stats
from gradfilter.lab.models._build import build_model


@pytest.mark.parametrize("title", stats.MEASURES)
def test_all_ways_give_the_same_numbers(title):
    model = build_model("resnet18_2", classes=4, shape=(3, 8, 8)).eval().double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = {name: way() for name, way in stats.contenders(title, model, x).items()}
    for name, values in found.items():
        torch.testing.assert_close(values, found[stats.BASE], rtol=1e-4, atol=0, msg=name)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, capsys):
    stats.main(["--quick", "--rounds", "1", "--classes", "10", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "stats-cpu.json").read_text())
    assert written["benchmark"] == "stats" and written["quick"] and written["rounds"] == 1
    contests = written["workloads"]
    assert [c["title"] for c in contests] == [f"{t}, C = 10, N = 2" for t in stats.MEASURES]
    for contest in contests:
        assert contest["parameters"] == 700042
        for result in contest["results"].values():
            assert result["failure"] is None
            assert result["seconds"]["median"] > 0 and result["peak_bytes"] > 0
        assert contest["ratios"] and contest["results"][stats.BASE]["ratio"]["median"] == 1
    assert "jacobian_norm" in capsys.readouterr().out
