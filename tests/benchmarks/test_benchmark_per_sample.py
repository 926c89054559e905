"""The per-sample benchmark: all libraries compute equal gradients, or no time is measured."""

import sys

import pytest
import torch
from benchmarks._models import Task, images
from benchmarks._setting import Setting
from torch import nn

from benchmarks import per_sample

CPU = torch.device("cpu")
SMALL = Task(
    "Small",
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10)),
    images(10),
    (),
)
# Opacus's hooks on a first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.mark.slow
def test_everybody_is_timed_and_right(capfd):
    contest = per_sample.measure("small", SMALL, 12, 1, CPU)
    libraries = {"gradfilter", "opacus", "ExpandedWeights", "vmap(grad)"}
    asked = {per_sample.label(who, what) for who in libraries for what in per_sample.QUESTIONS}
    direct = {"opacus ghost: norms", "torchjd: norms", "torchjd: consensus"}
    assert set(contest.results) == {"plain"} | asked | direct
    for name, result in contest.results.items():
        assert result.ratio or "is not installed" in result.failure, name


@pytest.mark.parametrize("question", ["norms", "consensus", "rows"])
def test_a_wrong_answer_is_refused(question):
    setting = Setting.of(SMALL, 12, CPU)
    entrants = per_sample.contenders(setting)
    name = per_sample.label("vmap(grad)", question)
    right = entrants[name]

    def wrong():
        answer = right()
        return answer * 1.001 if question == "norms" else {n: g * 1.001 for n, g in answer.items()}

    per_sample.check({name: right}, setting)
    with pytest.raises(ValueError, match=r"float64 loop, found a relative difference of 1\.0e-03"):
        per_sample.check({name: wrong}, setting)


def test_a_library_that_is_missing_is_left_to_the_race(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    setting = Setting.of(SMALL, 12, CPU)
    entrants = per_sample.contenders(setting)
    per_sample.check(entrants, setting)
    results, _ = per_sample.race(
        {n: entrants[n] for n in ("plain", "opacus ghost: norms")}, 1, CPU, base="plain"
    )
    assert results["opacus ghost: norms"].failure == "opacus.grad_sample is not installed"
    assert results["plain"].ratio.median == 1
