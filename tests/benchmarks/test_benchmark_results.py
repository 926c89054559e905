"""Files of results: the parts of earlier runs that are kept, and the values that are read again."""

import json

import pytest
from benchmarks._results import Result, Workload, load, save
from benchmarks._timing import Spread

FACTS = {
    "benchmark": "some",
    "device_name": "a",
    "threads": 2,
    "torch": "2",
    "python": "3",
    "quick": False,
    "date": "yesterday",
    "rounds": 3,
}
SPREAD = Spread(2.0, 1.0, 3.0, 0.5, 4.0)


def workload(model, seconds=SPREAD):
    return Workload(
        model=model,
        title=model.upper(),
        parameters=7,
        results={"plain": Result(seconds, SPREAD, 5), "other": Result(failure="no")},
        ratios={"a / b": SPREAD},
        microbatches=8,
        samples_per_microbatch=16,
    )


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path / "new" / "f.json", FACTS, [workload("mlp")])
    assert load(tmp_path / "new" / "f.json") == [workload("mlp")]


def test_another_model_stays_with_its_date_and_the_same_is_replaced(tmp_path):
    path = tmp_path / "f.json"
    save(path, FACTS, [workload("mlp"), workload("gpt")])
    save(path, {**FACTS, "date": "today", "rounds": 9}, [workload("gpt", Spread(1, 1, 1, 1, 1))])
    mlp, gpt = json.loads(path.read_text())["workloads"]
    assert (mlp["model"], mlp["date"], mlp["rounds"]) == ("mlp", "yesterday", 3)
    assert (gpt["model"], gpt["date"], gpt["rounds"]) == ("gpt", "today", 9)
    assert load(path)[1].results["plain"].seconds.median == 1


@pytest.mark.parametrize("changed", ["device_name", "threads", "torch", "python", "quick"])
def test_nothing_stays_of_another_machine(tmp_path, changed):
    path = tmp_path / "f.json"
    save(path, FACTS, [workload("mlp")])
    save(path, {**FACTS, changed: "different"}, [workload("gpt")])
    assert [w.model for w in load(path)] == ["gpt"]
