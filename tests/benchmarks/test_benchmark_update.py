"""The benchmark of updates: all candidates take equal steps, and all of them are timed."""

import json
import sys

import pytest
import torch

from benchmarks import update

CPU = torch.device("cpu")
SHAPES = {"weight": torch.Size((3, 4)), "bias": torch.Size((3,))}


@pytest.mark.slow
def test_the_script_measures_every_way(tmp_path, capsys):
    update.main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "update-cpu.json").read_text())
    assert written["benchmark"] == "update" and written["quick"]
    assert [workload["model"] for workload in written["workloads"]] == list(update.RULES)
    for workload in written["workloads"]:
        assert workload["parameters"] == 11689512
        clips = update.CLIPS if "agc" in workload["model"] else []
        assert list(workload["results"]) == [*update.TORCH, *clips, *update.WAYS]
        for name, result in workload["results"].items():
            assert result["failure"] is None
            assert result["seconds"]["median"] > 0
            parameters = 4 * workload["parameters"]
            if name.startswith("ours"):
                assert (result["peak_bytes"] < 1.5 * parameters) == ("donated" in name)
    assert "62 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("rule", update.RULES)
def test_whoever_ends_elsewhere_is_refused(rule, monkeypatch):
    update.check(rule, CPU)
    monkeypatch.setitem(update.WAYS, "ours, twice", {"twice": True})
    right = update.ours

    def wrong(*arguments, twice=False, **options):
        step = right(*arguments, **options)
        return (lambda: (step(), step())[1]) if twice else step

    monkeypatch.setattr(update, "ours", wrong)
    with pytest.raises(ValueError, match=r"after three steps, found .* for ours, twice"):
        update.check(rule, CPU)


def test_a_library_that_is_missing_is_left_to_the_race(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    update.check("agc_clip + sgd", CPU)


@pytest.mark.parametrize("rule", update.RULES)
def test_everybody_ends_at_the_same_parameters(rule, monkeypatch):
    trees = []
    random_tree = update.random_tree

    def remembered(*arguments):
        trees.append(random_tree(*arguments))
        return trees[-1]

    monkeypatch.setattr(update, "random_tree", remembered)
    steps = {
        "torch": update.of_torch(rule, SHAPES, CPU, clip=update.TIMM if "agc" in rule else None),
        "ours": update.ours(rule, SHAPES, CPU, donate=True, gated=True),
    }
    for step in steps.values():
        for _ in range(3):
            step()
    theirs, _, mine, _ = trees  # torch's and the donated steps are taken in place
    start = random_tree(SHAPES, 0.05, 0, CPU)
    for name in SHAPES:
        torch.testing.assert_close(mine[name], theirs[name])
        assert not torch.equal(mine[name], start[name])
