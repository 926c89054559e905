"""The command line of every benchmark, on small sizes."""

import json
import sys

import pytest
import torch
from benchmarks._models import Task, images
from benchmarks._plans import PLANS
from benchmarks._setting import Setting
from torch import nn

from benchmarks import _row_sections as row_sections
from benchmarks import (
    compiled,
    growth,
    language,
    layers,
    memory,
    padded,
    rows_along,
    rules,
    sharpness,
)
from gradfilter.grads.fused.overrides._convolution import FORMATS
from gradfilter.grads.fused.overrides._losses import LOSSES
from gradfilter.grads.fused.overrides._matrix_products import PRODUCTS
from gradfilter.grads.fused.overrides._row_by_row import ROW_BY_ROW
from gradfilter.grads.fused.overrides._vmap_faults import FAULTS

CPU = torch.device("cpu")
LINEAR = Task("Linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), images(10), ())


def run(module, tmp_path, *options):
    module.main(["--quick", "--rounds", "1", "--models", "mlp", "--out", str(tmp_path), *options])
    name = module.__name__.removeprefix("benchmarks.")
    written = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    assert written["benchmark"] == name and written["rounds"] == 1 and written["quick"]
    for workload in written["workloads"]:
        assert workload["model"] == "mlp" and workload["parameters"] == 1841162
        for result in workload["results"].values():
            assert result["failure"] is None
            assert result["seconds"]["median"] > 0 and result["peak_bytes"] > 0
    return written["workloads"]


def test_growth_is_over_two_microbatches(tmp_path, capsys):
    (workload,) = run(growth, tmp_path)
    assert list(workload["results"]) == ["plain", "M = 2", "M = 8"]
    assert workload["results"]["M = 2"]["ratio"]["median"] == 1
    assert "M = 8" in capsys.readouterr().out


def test_memory_is_over_plain_and_shown_beside_the_rows_themselves(tmp_path, capsys):
    (workload,) = run(memory, tmp_path)
    assert list(workload["results"]) == ["plain", *PLANS, *memory.BUDGETS]
    assert workload["results"]["plain"]["ratio"]["median"] == 1
    gradient = 4 * workload["parameters"]
    assert workload["results"]["loop"]["peak_bytes"] > 2 * gradient
    for budget in memory.BUDGETS:
        assert workload["results"][budget]["peak_bytes"] < 2 * gradient
    assert f"{2 * gradient / 1e6:.0f} MB" in capsys.readouterr().out


@pytest.mark.slow
def test_sharpness_is_over_a_step_of_torch(tmp_path):
    *contests, around = run(sharpness, tmp_path)
    assert around["title"].endswith(sharpness.AROUND)
    assert [*around["results"]][2:] == [
        f"{library}: {name}"
        for name in ("SAM", "GSAM")
        for library in ("gradfilter", "gradfilter.interop", "pytorch_optimizer")
    ]
    for contest, way in zip(contests, sharpness.WAYS, strict=True):
        assert contest["title"].endswith(way.title)
        assert contest["results"][sharpness.BASE]["ratio"]["median"] == 1
        assert [*contest["results"]][2:] == ["plain", "SAM", "GSAM"]


@pytest.mark.parametrize("name", sharpness.OPTIMIZERS)
def test_an_optimizer_that_ends_elsewhere_is_refused(name, monkeypatch):
    setting = Setting.of(LINEAR, 6, CPU)
    sharpness.check(setting)
    (_, right), *_ = sharpness.OPTIMIZERS[name].items()

    def wrong(model, batch, lr):
        return right(model, batch, 1.001 * lr)

    monkeypatch.setitem(sharpness.OPTIMIZERS[name], "wrong", wrong)
    with pytest.raises(
        ValueError, match=r"after a step, found a relative difference of 1\.0e-03 for wrong"
    ):
        sharpness.check(setting)


def test_an_optimizer_that_is_missing_is_left_to_the_race(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    setting = Setting.of(LINEAR, 6, CPU)
    sharpness.check(setting)
    with pytest.raises(ModuleNotFoundError):
        sharpness.optimizers(setting)["pytorch_optimizer: SAM"]()


def test_rules_are_taken_out_one_at_a_time_and_put_back(tmp_path):
    before = dict(rules.OVERRIDES)
    chosen = ["linear", "rnn"]
    rules.main(["--quick", "--rounds", "1", "--rules", *chosen, "--out", str(tmp_path)])
    assert before == rules.OVERRIDES
    linear, rnn = json.loads((tmp_path / "rules-cpu.json").read_text())["workloads"]
    assert all(result["seconds"]["median"] > 0 for result in linear["results"].values())
    assert "lstm cannot run" in rnn["results"][rules.WITHOUT]["failure"]
    assert rnn["results"][rules.BASE]["failure"] is None


def test_every_rule_has_a_model_that_leans_on_it():
    named = {name for case in rules.CASES for name in case.functions}
    # Rules that are there to be right, not fast: vmap's own answer is wrong, or there is none.
    right_first = {"embedding_bag", "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"}
    right_first |= {rules.called(function) for function in (*FAULTS, *FORMATS)}
    # The benchmark of layers compares these with the loop.
    right_first |= {rules.called(f) for f in (*PRODUCTS, *LOSSES, *ROW_BY_ROW)} - named
    assert {rules.called(function) for function in rules.OVERRIDES} - right_first == named


@pytest.mark.parametrize("module", [compiled, growth, layers, memory, rows_along, rules, sharpness])
def test_a_command_says_what_it_is_for(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_layers_run_with_every_plan_and_without_torchs_warning(tmp_path):
    layers.main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "layers-cpu.json").read_text())
    assert [w["model"] for w in written["workloads"]] == list(layers.LAYERS)
    for workload in written["workloads"]:
        assert list(workload["results"]) == ["plain", "loop", "fused"]
        assert not any(result["failure"] for result in workload["results"].values())


def test_compiled_steps_agree_and_are_timed(tmp_path, monkeypatch):
    # torch's own compiler takes a minute; the contender is the same without it.
    eager = compiled.torch_step
    monkeypatch.setattr(
        compiled, "torch_step", lambda setting, compiled: eager(setting, compiled=False)
    )
    (workload,) = run(compiled, tmp_path, "--backend", "graph")
    assert list(workload["results"]) == ["torch", "torch, compiled", "eager", "graph", "compiled"]
    assert set(workload["first_call_seconds"]) == {"torch, compiled", "graph", "compiled"}
    assert workload["results"]["torch"]["ratio"]["median"] == 1


def test_compiled_steps_that_do_not_agree_are_not_timed(monkeypatch):
    setting = Setting.of(LINEAR, 8, CPU)
    ways = {
        "eager": compiled.own_step(setting, 2, None),
        "graph": lambda: {name: p + 0.1 for name, p in setting.params.items()},
    }
    with pytest.raises(AssertionError, match='step of "eager", found another of "graph"'):
        compiled.first_calls(setting, ways)


@pytest.mark.slow
def test_rows_along_agree_and_are_timed(tmp_path):
    options = ["--quick", "--rounds", "1", "--models", "mlp-small", "--out", str(tmp_path)]
    rows_along.main([*options, "--backend", "graph"])
    (workload,) = json.loads((tmp_path / "rows_along-cpu.json").read_text())["workloads"]
    assert list(workload["results"]) == [
        "plain", "products", "products, compiled", "M sets of parameters", "loop"
    ]  # fmt: skip
    assert not any(result["failure"] for result in workload["results"].values())


def test_rows_that_do_not_agree_are_not_timed(monkeypatch):
    monkeypatch.setattr(rows_along, "TOLERANCE", 0.0)
    with pytest.raises(AssertionError, match="is off by"):
        rows_along.check(rows_along.CASES["mlp-small"], torch.device("cpu"), "graph")


@pytest.mark.slow
def test_language_models_are_timed_and_their_memory_is_measured(tmp_path):
    pytest.importorskip("peft")
    for model in ("gpt2", "gpt2-lora"):
        language.main(["--quick", "--rounds", "1", "--models", model, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "language-cpu.json").read_text())
    for workload in written["workloads"]:
        assert workload["results"].keys() == set(language.CONTENDERS[workload["model"]])
        assert all(result["peak_bytes"] for result in workload["results"].values())
        assert written["resident_bytes"][workload["model"]].keys() == {"plain", language.CLIP}


@pytest.mark.slow
def test_padded_text_is_counted_and_timed(tmp_path, capsys):
    pytest.importorskip("transformers")
    options = ["--quick", "--rounds", "1", "--models", "bert-32", "--out", str(tmp_path)]
    padded.main(options)
    written = json.loads((tmp_path / "padded-cpu.json").read_text())
    assert written["fused"]["bert-32"] == {
        "batches": 20, "fused_batches": 20, "steps": 8, "fused_steps": 8
    }  # fmt: skip
    rows, training = written["workloads"]
    assert list(rows["results"]) == ["plain", "loop", "fused", "fused, no padding"]
    assert list(training["results"]) == ["Trainer", "FilteredTrainer"]
    assert "20 of 20 batches fused, 8 of 8 steps" in capsys.readouterr().out
    section = row_sections.padded(written)
    assert "20 of 20 batches and 8 of 8 steps" in section.text and "FilteredTrainer" in section.more
