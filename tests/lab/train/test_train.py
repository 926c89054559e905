"""`gradfilter train`: its counts, schedules, measurements and files."""

import json
import math
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import fields
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfilter as gf
from _lab import command, config, metrics, numbers, only_run, refused
from gradfilter.lab._options import arguments, presets
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train import _train as _trackers
from gradfilter.lab.train._accuracies import accuracies
from gradfilter.lab.train._archive import checkpoints, read_tensors
from gradfilter.lab.train._build_training import build_training, schedule_of, update_of
from gradfilter.lab.train._record import resume, write_point
from gradfilter.lab.train._restore import restored
from gradfilter.lab.train._run_place import find_runs, place_of
from gradfilter.lab.train._train import Watch, train_to_the_end, why_all_skipped, why_not_finite
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._train_config import GROUPS, TrainConfig
from gradfilter.lab.train._training import advance, evaluation

CPU = torch.device("cpu")
SMALL = ["train", "--model", "mlp_8", "--epochs", 2, "--log-level", "error"]


def run_of(*options):
    return build_training(parse_train([str(option) for option in options]).settings, CPU)


def trained(*options):
    run = run_of("--model", "mlp_8", *options)
    lines = []
    assert train_to_the_end(run, Watch(evaluated=lines.append), lambda: False)
    return run, lines


# Counting


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_samples_are_counted_alike_for_every_number_of_microbatches(rows):
    options = ["--microbatches", rows, "--epochs", 3, "--train-split", 1000]
    run, lines = trained(*options)
    assert [line.samples for line in lines] == [0, 1040, 2000, 3040]
    assert [line.step for line in lines] == [0, 13, 25, 38]
    balanced, lines = trained(*options, "--samples-per-class", 8 // rows)
    assert [line.samples for line in lines] == [0, 1040, 2000, 3040]
    assert balanced.batch_size == run.batch_size == 80


@pytest.mark.parametrize("size", [7, 64, 400])
def test_an_epoch_is_as_many_samples_as_there_are(size):
    _, lines = trained("--batch-size", size, "--epochs", 3, "--train-split", 500)
    assert len(lines) == 4
    for epoch, line in enumerate(lines):
        assert 0 <= line.samples - 500 * epoch < size


def test_results_do_not_depend_on_how_often_they_are_looked_at():
    options = ["--epochs", 4, "--agree", 0.9, "--microbatches", 4, "--schedule", "plateau"]
    often, lines = trained(*options, "--eval-every", 0.5, "--save-checkpoint", 0.7)
    rarely, few = trained(*options, "--eval-every", 3)
    for name, value in gf.state_dict(often.state).items():
        assert torch.equal(value, gf.state_dict(rarely.state)[name]), name
    assert [line.step for line in few] == [0, 48, 63] and len(lines) == 9
    by_step = {line.step: vars(line) for line in lines}
    for line in few:
        assert str(numbers(vars(line))) == str(numbers(by_step[line.step]))


def test_the_loss_of_a_line_is_that_of_its_epoch():
    _, lines = trained("--epochs", 2, "--eval-every", 2)
    again = run_of("--model", "mlp_8", "--epochs", 2)
    advance(again, 16)
    losses = []
    while again.done < 32:
        before = again.totals["loss"].item()
        advance(again, again.done + 1)
        losses.append(again.totals["loss"].item() - before)
    assert lines[-1].loss == pytest.approx(sum(losses) / 16, rel=1e-6)


# Schedules and chains


@pytest.mark.parametrize("name", ["constant", "step", "linear", "cosine", "poly", "plateau"])
def test_warm_up_starts_where_it_should_and_reaches_the_target(name):
    made = TrainConfig(
        schedule=name, learning_rate=0.4, lr_warmup_epochs=2, lr_warmup_initial=0.1, lr_step=3
    )
    schedule = schedule_of(made, total_steps=100, steps_per_epoch=10)
    count = torch.tensor(0)
    values = [schedule.at(torch.tensor(k), schedule.init(count))[0].item() for k in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[10] == pytest.approx(0.25)
    assert values[20] == pytest.approx(0.4)
    assert max(values) == pytest.approx(0.4)
    if name == "step":
        assert values[49] == pytest.approx(0.4) and values[50] == pytest.approx(0.04)
    if name in ("linear", "cosine"):
        assert values[99] < 0.01


def test_the_schedule_follows_the_steps_done_also_where_steps_are_skipped():
    # At threshold 0 every step is skipped, and the learning rate falls all the same.
    options = ["--agree", 0, "--microbatches", 2, "--schedule", "linear", "--epochs", 4]
    run, lines = trained(*options, "--learning-rate", 0.64)
    assert lines[-1].skipped == run.total_steps == 63
    assert lines[-1].lr == pytest.approx(0.64 * (1 - 62 / 63))


def test_plateau_watches_what_is_not_the_test_split():
    options = ["--schedule", "plateau", "--lr-patience", 0, "--learning-rate", 1e-9]
    _, lines = trained(*options, "--epochs", 5, "--val-split", 200, "--eval-every", 5)
    # Nothing improves by a ten-thousandth at such a rate: every epoch after the first is a drop.
    assert lines[-1].lr == pytest.approx(1e-9 * 0.1**3, rel=1e-3)
    assert lines[-1].val_accuracy >= 0


CHAINS = {
    (): ["mean_rows", "sgd"],
    ("--agree", "0.9", "--microbatches", "4", "--agc", "0.1"): ["agree_filter", "agc_clip", "sgd"],
    ("--agree", "0.9", "--agree-per", "layer", "--agree-exclude", "head.*", "--per-sample"): [
        *("agree_filter", "sgd"),
    ],
    ("--trimmed-mean", "2", "--per-sample"): ["trimmed_mean", "sgd"],
    ("--coordinate-median", "--per-sample", "--sam", "0.05", "--m-sharpness"): [
        *("sam_perturb", "coordinate_median", "sgd"),
    ],
    ("--geometric-median", "--microbatches", "4", "--sam", "0.05"): [
        *("geometric_median", "sam_perturb", "sgd"),
    ],
    ("--centered-clip", "0.5", "--microbatches", "4"): ["centered_clip", "sgd"],
    ("--budget-clip", "--per-sample"): ["budget_clip", "mean_rows", "sgd"],
    ("--budget-clip", "0.5", "--budget-power", "0", "--microbatches", "4", "--ema", "0.9"): [
        *("budget_clip", "mean_rows", "sgd", "ema_params"),
    ],
    ("--clip-quantile", "--trim-losses", "0.2", "--microbatches", "4", "--watch", "2"): [
        *("trim_losses", "clip_per_row", "mean_rows", "watch", "sgd"),
    ],
    ("--clip-smallest", "--clip-per-leaf", "--outlier-filter", "--per-sample"): [
        *("outlier_filter", "clip_per_row", "mean_rows", "sgd"),
    ],
    ("--normalize-rows", "--reference", "--microbatches", "4", "--spike-clip", "--spike-skip"): [
        *("normalize_rows", "reference_filter", "spike_skip", "spike_clip", "sgd"),
    ],
    ("--reference", "average", "--per-sample", "--agc", "0.1", "--adagc"): [
        *("reference_filter", "agc_clip", "spike_clip", "sgd"),
    ],
    ("--consensus", "--per-sample", "--clip-per-row", "1"): [
        *("clip_per_row", "consensus_filter", "sgd"),
    ],
    ("--sam", "0.05", "--gsam", "0.4", "--optimizer", "adamw"): [
        *("mean_rows", "sam_perturb", "gsam_decompose", "adamw"),
    ],
    ("--sam", "0.05", "--friendly-sam", "1", "--gsam", "0.4"): [
        *("mean_rows", "friendly_sam", "gsam_decompose", "sgd"),
    ],
    ("--sam", "0.05", "--look-sam", "5", "--adaptive", "gsam", "--microbatches", "4"): [
        *("mean_rows", "look_sam", "sgd"),
    ],
    ("--sam", "0.05", "--m-sharpness", "--microbatches", "4", "--optimizer", "rmsprop"): [
        *("sam_perturb", "mean_rows", "rmsprop"),
    ],
    ("--optimizer", "lion", "--cautious", "--learning-rate", "1e-3"): ["mean_rows", "cautious"],
    ("--schedule-free", "--lr-warmup-epochs", "0.1"): ["mean_rows", "schedule_free"],
    ("--msam", "0.3", "--optimizer", "adamw", "--cautious"): ["mean_rows", "msam"],
    ("--per-sample", "--optimizer", "per_example_adam", "--betas", "0.5", "0.9", "--eps", "0.1"): [
        *("mean_rows", "per_example_adam"),
    ],
    ("--agree", "0.9", "--microbatches", "4", "--sam", "0.05", "--rho-schedule", "proportional"): [
        *("agree_filter", "sam_perturb", "sgd"),
    ],
}


@pytest.mark.parametrize("options", CHAINS)
def test_options_make_the_chain_they_name(options):
    update = update_of(parse_train(list(options)).settings, 10, 5)
    assert [link.name for link in update.parts] == CHAINS[options]
    _, lines = trained(*options, "--steps", 3)
    assert math.isfinite(lines[-1].loss)


def test_metrics_say_what_the_chain_did():
    options = ["--consensus", "--per-sample", "--clip-per-row", 0.5, "--agc", 0.01, "--sam", 0.1]
    _, lines = trained(*options, "--steps", 5, "--label-noise", 0.3)
    last = lines[-1]
    assert 0 < last.accepted < 1 and 0 < last.clipped_rows <= 1 and 0 < last.clipped_units <= 1
    assert last.surrogate_gap > 0 and last.rho == 0.1 and last.lr == 0.05
    assert -1 <= last.cosine <= 1 and last.noise_scale > 0 and last.peak_memory > 1e6
    assert last.samples_per_second > 0 and last.seconds > 0
    _, lines = trained("--steps", 5)
    plain = lines[-1]
    for name in ("cosine", "noise_scale", "clipped_rows", "clipped_units", "surrogate_gap", "rho"):
        assert math.isnan(getattr(plain, name))
    assert math.isnan(plain.memorised) and math.isnan(plain.val_accuracy)


def test_the_surrogate_gap_is_a_mean_over_the_steps_that_have_one():
    options = ["--sam", 0.1, "--steps", 9, "--batch-size", 50]
    _, lines = trained(*options, "--look-sam", 4)
    gap, steps = lines[-1].surrogate_gap, []
    run = run_of("--model", "mlp_8", *options, "--look-sam", 4)
    for step in range(9):
        before = run.totals["gap"].item()
        advance(run, step + 1)
        steps.append(run.totals["gap"].item() - before)
    assert [found > 0 for found in steps] == [step % 4 == 0 for step in range(9)]
    assert gap == pytest.approx(sum(steps) / 3)


def test_a_point_of_an_earlier_version_has_a_surrogate_gap_in_every_step(tmp_path):
    options = ["--model", "mlp_8", "--sam", 0.1, "--steps", 9]
    run, again = run_of(*options), run_of(*options)
    advance(run, 5)
    write_point(tmp_path, run)
    flat = torch.load(tmp_path / "resume.pt", weights_only=True)
    del flat["totals.gaps"]
    torch.save(flat, tmp_path / "resume.pt")
    resume(tmp_path, again)
    assert again.totals["gaps"] == run.totals["gaps"] == 5


def test_the_budget_limits_what_is_clipped():
    options = ["--budget-clip", 0.3, "--per-sample", "--steps", 30]
    _, lines = trained(*options)
    assert 0 < lines[-1].clipped_rows <= 1
    assert run_of(*options).config.budget_power == 3


def test_watch_records_what_it_measured_last():
    _, lines = trained("--per-sample", "--watch", 2, "--steps", 5, "--consensus")
    last = lines[-1]
    assert 0 < last.watch_accepted_fraction < 1 and 1 < last.watch_effective_rows < 80
    assert last.watch_norm_10 < last.watch_norm_50 < last.watch_norm_90
    assert -1 < last.watch_cosine < 1 and last.watch_loss_90 > last.watch_loss_10 > 0
    _, lines = trained("--steps", 5)
    assert math.isnan(lines[-1].watch_cosine)


def test_a_training_that_gave_up_ends_with_an_error():
    """At this rate the numbers overflow, and every step is skipped from then on."""
    options = ["--spike-skip", "--steps", 200, "--learning-rate", 1e12]
    with pytest.raises(UsageError, match=r"--spike-skip: gave up before step \d+"):
        trained(*options)


def test_clean_samples_have_their_true_labels():
    options = ["--microbatches", 4, "--reference", "--label-noise", 0.9, "--reference-samples", 40]
    run = run_of(*options)
    images, labels = run.reference
    assert len(images) == len(labels) == 40
    train = run.data.train
    own = train.images.fetch(torch.arange(len(train))).flatten(1)
    for image, label in zip(images.flatten(1), labels, strict=True):
        assert label in train.clean[(own == image).all(1)]
    assert (
        labels != run_of("--microbatches", 4, "--reference", "--label-seed", 3).reference[1][:40]
    ).any()


def test_averaged_parameters_are_what_is_measured_and_saved(tmp_path):
    options = ["--ema", 0.95, "--steps", 40, "--learning-rate", 0.3]
    run, lines = trained(*options)
    average = gf.ema_of(run.state)
    state = {"params": average, "buffers": run.state["buffers"]}
    expected = accuracies(run.model, state, run.data)
    last = accuracies(run.model, run.state, run.data)
    assert expected["test_loss"] != last["test_loss"]
    assert lines[-1].test_loss == expected["test_loss"]
    assert command("train", "--model", "mlp_8", *options, "--save-dir", tmp_path)[0] == 0
    archive = only_run(tmp_path) / "checkpoints.zip"
    saved = read_tensors(archive, checkpoints(archive)[-1])
    for name, leaf in average.items():
        assert torch.equal(saved[f"params.{name}"], leaf)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--schedule-free"],
        ["--schedule-free", "--optimizer", "adamw", "--learning-rate", 0.01],
        ["--msam", 0.5],
        ["--msam", 0.5, "--optimizer", "lion", "--learning-rate", 0.001, "--cautious"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_parameters_that_are_not_those_of_the_training_are_measured_and_saved(options, tmp_path):
    options = [*options, "--steps", 30]
    run, lines = trained(*options)
    params = gf.evaluated_params(run.state["params"], run.state)
    assert all((params[name] != leaf).any() for name, leaf in run.state["params"].items())
    state = {"params": params, "buffers": run.state["buffers"]}
    expected = accuracies(run.model, state, run.data)
    assert expected["test_loss"] != accuracies(run.model, run.state, run.data)["test_loss"]
    assert lines[-1].test_loss == expected["test_loss"]
    assert command("train", "--model", "mlp_8", *options, "--save-dir", tmp_path)[0] == 0
    archive = only_run(tmp_path) / "checkpoints.zip"
    saved = read_tensors(archive, checkpoints(archive)[-1])
    for name, leaf in params.items():
        assert torch.equal(saved[f"params.{name}"], leaf)


def test_the_share_of_the_average_is_the_momentum_that_is_given():
    for options, beta in (
        (["--momentum", 0.5], 0.5),
        ([], 0.9),
        (["--optimizer", "adam", "--betas", 0.7, 0.99], 0.7),
        (["--optimizer", "adamw"], 0.9),
    ):
        run = run_of("--schedule-free", *options, "--steps", 1)
        found = gf.hyperparameters(run.step.update)
        assert found["schedule_free/beta"] == beta
        assert found.get("schedule_free/rule/momentum", 0) == 0
        assert found.get("schedule_free/rule/betas/0", 0) == 0


def test_muon_moves_matrices_and_adamw_all_else():
    options = ["--optimizer", "muon", "--model", "cnn3_4", "--learning-rate", 0.01]
    run, lines = trained(*options, "--weight-decay", 0.1, "--steps", 20)
    state = run.state["transforms"]["partition"]
    shapes = {name: p.ndim for name, p in run.state["params"].items()}
    assert {*state["matrices"]["momentum"]} == {name for name, n in shapes.items() if n == 2}
    assert {*state["rest"]["m"]} == {name for name, n in shapes.items() if n != 2}
    assert lines[-1].train_loss < lines[0].train_loss
    assert lines[-1].lr == 0.01


def test_agc_leaves_alone_what_it_should():
    run = run_of("--model", "mlp_8", "--agc", 1e-6, "--agc-exclude", "head.*", "--steps", 1)
    before = {name: value.clone() for name, value in run.state["params"].items()}
    advance(run, 1)
    moved = {n: (run.state["params"][n] - v).abs().max().item() for n, v in before.items()}
    assert moved["head.weight"] > 1e-4 > 1e-6 > moved["features.1.weight"]


def test_parameters_without_decay_do_not_shrink():
    def moved(*options):
        run = run_of("--model", "mlp_8", "--weight-decay", 100, *options, "--steps", 1)
        before = {name: value.clone() for name, value in run.state["params"].items()}
        advance(run, 1)
        return {n: run.state["params"][n] - v for n, v in before.items()}

    everywhere, some = moved(), moved("--no-decay", "head.*")
    assert torch.equal(everywhere["features.1.weight"], some["features.1.weight"])
    assert not torch.equal(everywhere["head.weight"], some["head.weight"])
    assert some["head.weight"].abs().max() < 0.1 < everywhere["head.weight"].abs().max()


def test_label_smoothing_is_torch_s():
    run = run_of("--model", "mlp_8", "--label-smoothing", 0.2, "--steps", 1)
    evaluated = evaluation(run)
    assert math.isnan(evaluated.loss)
    samples, chosen = run.data.train, run.order(0, 1)[0]
    logits = torch.func.functional_call(
        run.model, run.state["params"], (samples.images.fetch(chosen),)
    )
    expected = torch.nn.functional.cross_entropy(
        logits, samples.labels[chosen], label_smoothing=0.2
    )
    advance(run, 1)
    assert run.totals["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("rule", [["--early-exit-accuracy", 0.6], ["--early-exit-loss", 1.2]])
def test_early_exit_is_at_the_end_of_the_first_epoch_that_is_good_enough(rule, tmp_path):
    options = ["train", "--model", "mlp_32", "--epochs", 30, "--eval-every", 100, *rule]
    assert command(*options, "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    last = metrics(run)[-1]
    value = last["train_accuracy"] if "accuracy" in rule[0] else -last["train_loss"]
    assert value >= (0.6 if "accuracy" in rule[0] else -1.2)
    assert 0 < last["step"] < 200 and config(run)["status"] == "finished"
    assert [c.step for c in checkpoints(run / "checkpoints.zip")] == [0, last["step"]]
    assert command(*options, "--save-dir", tmp_path, "--resume")[1].startswith("finished already")


def test_mixed_precision_and_compilation_train():
    for options in (["--amp", "bf16"], ["--amp", "bf16", "--microbatches", 4, "--agree", 0.97]):
        run, lines = trained(*options, "--epochs", 3)
        assert lines[-1].train_accuracy > 2 * lines[0].train_accuracy
        assert run.state["params"]["head.weight"].dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_is():
    plain, expected = trained("--steps", 4, "--microbatches", 2)
    compiled, found = trained("--steps", 4, "--microbatches", 2, "--compile")
    assert compiled.state["params"].keys() == plain.state["params"].keys()
    assert found[-1].loss == pytest.approx(expected[-1].loss, rel=1e-4)


# What is written


@pytest.mark.slow
@settings(max_examples=25)
@given(
    noise=st.floats(0, 0.99),
    seed=st.integers(0, 10**6),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    additions=st.sampled_from([(), ("batchnorm",), ("dropout-0.1", "batchnorm")]),
    agree=st.none() | st.floats(0, 2),
    nesterov=st.booleans(),
)
def test_settings_go_through_a_file_and_back(tmp_path_factory, **values):
    values["label_noise"] = values.pop("noise")
    values["model_additions"] = values.pop("additions")
    typed = parse_train(arguments(values)).settings
    assert {name: getattr(typed, name) for name in values} == values
    printed = command("train", *arguments(values), "--print-config")[1]
    file = tmp_path_factory.mktemp("config") / "own.toml"
    file.write_text(printed)
    assert parse_train(["--config", str(file)]).settings == typed


def test_every_published_recipe_is_a_preset_that_prints_itself():
    known = {*presets()}
    assert known >= {
        *("gaf-cifar100", "gaf-cifar100n", "agc-cifar10", "gsam-cifar10"),
        *("double-descent-cifar10", "double-descent-digits"),
    }
    for name in known:
        code, printed, err = command("train", "--preset", name, "--print-config")
        assert (code, err) == (0, "") and printed.startswith("[train]\n")
        update_of(parse_train(["--preset", name]).settings, 1000, 100)
    for name, tables in {"train": "train", "sweep": "sweep", "stats": "stats"}.items():
        listed = " ".join(command(name, "--help")[1].split())
        help_of = listed[listed.index("--preset STR") : listed.index("--config PATH")]
        having = {k for k in known if tables in tomllib.loads(presets()[k].read_text())}
        assert {*re.findall(r"[\w]+(?:-[\w]+)+", help_of.replace("- ", "-"))} == having
    gaf = parse_train(["--preset", "gaf-cifar100", "--agree", "0.9"]).settings
    assert (gaf.data, gaf.agree, gaf.nesterov, gaf.lr_patience) == ("cifar100", 0.9, True, 100)


def test_the_help_lists_every_option_once_under_its_group():
    assert sorted(chain(*GROUPS.values())) == sorted(f.name for f in fields(TrainConfig))
    text = command("train", "--help")[1]
    assert "{None}" not in text and "(default: None)" not in text
    tables = re.split(r"(?m)^ ([a-z ]+)\n -+\n", text)[1:]
    listed = {
        title: [name.replace("-", "_") for name in re.findall(r"(?m)^  --([\w-]+)", rows)]
        for title, rows in zip(tables[::2], tables[1::2], strict=True)
    }
    assert listed.pop("options") == ["preset", "config", "print_config"]
    assert list(listed) == list(GROUPS)
    assert {title: sorted(names) for title, names in listed.items()} == {
        title: sorted(names) for title, names in GROUPS.items()
    }


def test_the_help_names_the_data_sets_that_the_error_does():
    text = " ".join(command("train", "--help")[1].split())
    text = text[text.index("--data STR") : text.index("--data-dir")]
    named = refused("train", "--data", "nothing").split("one of ")[1].split(", found")[0]
    assert all(re.search(rf"(^|[ ,]){name}[ ,]", text) for name in named.split(", "))


def test_the_environment_counts_less_than_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("NAME", "from-environment")
    monkeypatch.setenv("SAVE_DIR", str(tmp_path))
    monkeypatch.setenv("DEVICE", "")
    found = parse_train([]).settings
    assert (found.name, found.save_dir, found.device) == ("from-environment", tmp_path, "cpu")
    assert parse_train(["--name", "typed"]).settings.name == "typed"


def test_the_place_of_a_run_names_its_settings(tmp_path):
    made = TrainConfig(save_dir=tmp_path)
    assert place_of(made) == tmp_path / "mlp_256/digits/default/seed-0"
    typed = "--name mine --label-noise 0.2 --seed 3 --nesterov --agree 0.9 --eval-every 5"
    parsed = parse_train(
        ["--save-dir", str(tmp_path), "--data", "folder:/some/where", *typed.split()]
    ).settings
    assert place_of(parsed) == (
        tmp_path / "mine/mlp_256/folder-some-where/nesterov-agree-0.9/noise-0.2000-seed-3"
    )
    long = TrainConfig(save_dir=tmp_path, agc_exclude=tuple(f"layer.{i}" for i in range(99)))
    other = TrainConfig(save_dir=tmp_path, agc_exclude=tuple(f"layer.{i}" for i in range(98)))
    assert place_of(long) != place_of(other)
    assert all(len(part) < 200 for part in place_of(long).parts)


def test_a_run_leaves_everything_behind(tmp_path):
    options = [*SMALL, "--label-noise", 0.2, "--save-checkpoint", 1, "--val-split", 100]
    code, out, err = command(*options, "--save-dir", tmp_path)
    assert (code, err) == (0, "") and str(only_run(tmp_path)) in out
    run = only_run(tmp_path)
    assert {path.name for path in run.iterdir()} <= {
        *("config.json", "metrics.jsonl", "checkpoints.zip", "run.lock"),
        *("resume.pt", "resume.before.pt"),
    }
    found = config(run)
    assert found["settings"]["label_noise"] == 0.2 and found["status"] == "finished"
    assert found["samples"] == {"train": 1157, "val": 100, "test": 540}
    assert found["wrong_labels"] == 231 and found["parameters"] == 64 * 8 + 8 + 8 * 8 + 8 + 90
    assert [c.epoch for c in checkpoints(run / "checkpoints.zip")] == [
        0.0,
        *(line["epoch"] for line in map(_short, metrics(run)[1:])),
    ]
    labels = read_tensors(run / "checkpoints.zip", "labels.pt")
    assert torch.equal(labels["wrong"], labels["labels"] != labels["clean"])
    assert labels["wrong"].sum() == 231
    assert find_runs(tmp_path, model="mlp_8", label_noise=0.2, seed=0) == [run]
    assert find_runs(tmp_path, model="mlp_9") == []


def _short(line):
    return {**line, "epoch": round(line["epoch"], 6)}


def test_a_checkpoint_gives_the_metrics_of_its_line_again(tmp_path):
    assert command(*SMALL, "--label-noise", 0.2, "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    for saved, line in zip(
        checkpoints(run / "checkpoints.zip"), metrics(run)[:: len(metrics(run)) - 1], strict=True
    ):
        again = restored(run, saved, device=CPU)
        samples = again.data.train
        logits = again.model(samples.images.fetch(torch.arange(len(samples))))
        right = logits.argmax(1) == samples.labels
        assert right.double().mean().item() == pytest.approx(line["train_accuracy"])
        assert not again.model.training and again.config.model == "mlp_8"


def test_tensorboard_and_wandb_hear_of_every_evaluation(tmp_path, monkeypatch):
    heard = []

    class Run:
        def log(self, numbers, step):
            heard.append((step, numbers))

        def finish(self):
            heard.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(_trackers, "is_installed", lambda package: True)
    assert command(*SMALL, "--wandb", "--tensorboard", "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    lines = metrics(run)
    assert [step for step, _ in heard[:-1]] == [line["step"] for line in lines]
    assert heard[-1] == "finished" and "memorised" not in heard[0][1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("test_accuracy")]
    assert written == [(x["step"], pytest.approx(x["test_accuracy"])) for x in lines]


def test_what_is_not_installed_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(_trackers, "is_installed", lambda package: False)
    assert "pip install wandb" in refused(*SMALL, "--wandb", "--save-dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_ranks_train_what_one_process_trains(more, tmp_path):
    options = [*map(str, SMALL), "--microbatches", "4", "--agree", "0.9", "--dtype", "float64"]
    assert command(*options, "--save-dir", tmp_path / "alone")[0] == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["-m", "gradfilter", *options, *more, "--save-dir", tmp_path / "two"]
    done = subprocess.run([sys.executable, *launch, *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [only_run(tmp_path / name) for name in ("alone", "two")]
    for a, b in zip(*map(metrics, runs), strict=True):
        a, b = numbers(a), numbers(b)
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == b[key] or value == pytest.approx(b[key], rel=1e-10), key
    assert json.loads((runs[1] / "config.json").read_text())["processes"] == 2


# What once was wrong


def test_a_report_outlives_the_steps_that_are_skipped():
    # At this threshold many steps are skipped; nothing improves, so every epoch is a drop.
    options = ["--schedule", "plateau", "--lr-patience", 0, "--learning-rate", 1e-9, "--epochs", 8]
    _, lines = trained(*options, "--microbatches", 2, "--agree", 0.55)
    assert 0 < lines[-1].skipped < 126
    assert lines[-1].lr == pytest.approx(1e-9 * 0.1**6, rel=1e-3)


def test_a_loss_that_is_no_number_is_left_out_of_the_mean():
    run = run_of("--model", "mlp_8", "--microbatches", 2, "--agree", 1.9, "--epochs", 1)
    whole = run_of("--model", "mlp_8", "--microbatches", 2, "--agree", 1.9, "--epochs", 1)
    advance(whole, 1)
    first = whole.totals["loss"].item()
    advance(run, 1)
    run.data.train.images.source.fill_(0)
    step = run.step

    def spoilt(state, batch, **extra):
        return step(state, (batch[0] * torch.nan, batch[1]), **extra)

    run.step = spoilt
    advance(run, 2)
    run.step = step
    assert run.skipped.item() == 1
    assert evaluation(run).loss == pytest.approx(first)


def test_agreement_is_measured_with_the_dropout_of_the_next_step():
    options = ["--model", "mlp_32", "--model-additions", "dropout-0.5", "--microbatches", 4]
    run = run_of(*options)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluation(run).cosine)
    assert found[0] == found[1]
    assert found[0] == evaluation(run_of(*options)).cosine


def test_checkpoints_keep_every_digit(tmp_path):
    options = [*SMALL, "--dtype", "float64", "--save-dir", tmp_path]
    assert command(*options)[0] == 0
    run = only_run(tmp_path)
    last = checkpoints(run / "checkpoints.zip")[-1]
    flat = read_tensors(run / "checkpoints.zip", last)
    again = dict(restored(run, last, device=CPU).model.named_parameters())
    for name, value in flat.items():
        assert torch.equal(again[name.removeprefix("params.")], value)


def test_settings_that_only_look_alike_are_not_taken_for_a_finished_run(tmp_path):
    base = [*SMALL, "--save-dir", tmp_path, "--resume"]
    assert command(*base, "--label-noise", 0.10001)[0] == 0
    assert "other settings: label_noise" in refused(*base, "--label-noise", 0.1)
    assert command(*base, "--learning-rate", 0.12345678)[0] == 0
    assert "finished already" not in command(*base, "--learning-rate", 0.12345699)[1]


def test_options_that_stand_alone_and_names_of_others():
    found = parse_train(["--consensus", "--per-sample"]).settings
    assert found.consensus == 1.0
    found = parse_train(["--sam", "0.05", "--adaptive", "--optimizer", "sgd+nesterov"]).settings
    assert (found.adaptive, found.optimizer, found.nesterov) == ("asam", "sgd", True)
    sizes = parse_train(["--model-arguments", "depth=3"]).settings
    deep = build_training(sizes, CPU)
    assert len(deep.state["params"]) == 8


def test_odd_numbers_of_samples():
    run = run_of("--train-split", 90, "--samples-per-class", 10, "--steps", 1)
    assert run.batch_size == 100  # ragged classes cycle
    advance(run, 1)


def test_a_name_may_begin_with_a_hyphen(tmp_path):
    assert command(*SMALL, "--name=-x", "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    assert restored(run, checkpoints(run / "checkpoints.zip")[0], device=CPU).config.name == "-x"


# What it says of itself


def said(tmp_path, *options):
    """Lines of stdout and stderr of a training."""
    long = () if "--steps" in options else ("--epochs", 2)
    small = ["--model", "mlp_8", *long, *options, "--save-dir", tmp_path]
    code, out, err = command("train", *small)
    assert code == 0
    return out.splitlines(), err.splitlines()


def test_the_last_evaluation_is_marked_where_it_is_said_again(tmp_path):
    out, err = said(tmp_path)
    assert len(err) == 4 and err[0].startswith("writing to ")
    assert [line.split(":")[0] for line in err[1:]] == [
        *("epoch 0, step 0", "epoch 1.018, step 16", "epoch 2.037, step 32"),
    ]
    assert out == [f"last: {err[-1]}", f"wrote {only_run(tmp_path)}"]
    assert "loss" not in err[1] and "skipped" not in "".join(err)


ALL_SKIPPED = {
    "--microbatches 8 --agree 0.03": "--agree is a cosine distance, 1 - cos; did you mean 0.97?",
    "--per-sample --consensus 0.01 --consensus-hard": (
        "--consensus is a cosine distance, 1 - cos; did you mean 0.99?"
    ),
    "--batch-size 2 --microbatches 2 --agree 0.5": (
        "no rows agreed at --agree 0.5; a larger distance, up to 2, accepts more"
    ),
}


@pytest.mark.parametrize("options", ALL_SKIPPED)
def test_a_run_whose_every_step_was_skipped_says_so(options, tmp_path):
    out, err = said(tmp_path, *options.split(), "--steps", 2)
    assert metrics(only_run(tmp_path))[-1]["skipped"] == 2
    assert out[0].endswith(", skipped steps 100.0 %")
    assert err[-1] == f"every step was skipped: {ALL_SKIPPED[options]}"
    assert "every step" not in "".join(err[:-1])


def test_a_run_with_an_applied_step_gives_no_advice(tmp_path):
    out, err = said(tmp_path, "--microbatches", 2, "--agree", 0.55, "--learning-rate", 1e-9)
    last = metrics(only_run(tmp_path))[-1]
    assert 0 < last["skipped"] < last["step"] == 32
    assert out[0].endswith(f"skipped steps {100 * last['skipped'] / 32:.1f} %")
    assert "every step" not in "".join(err)


def test_a_run_that_diverges_says_when_and_once(tmp_path):
    out, err = said(tmp_path, "--learning-rate", "1e30")
    advice = [line for line in err if "not finite" in line]
    (line,) = advice
    since = int(re.fullmatch(r"the loss is not finite since step (\d+); .*", line)[1])
    assert line.endswith("; is --learning-rate too large?")
    again = run_of("--model", "mlp_8", "--learning-rate", "1e30", "--epochs", 2)
    advance(again, since)  # as many batches had a loss; the next one has none
    assert again.totals["losses"] == since
    advance(again, since + 1)
    assert again.totals["losses"] == since
    assert "step 16: loss nan, train" in err[2] and "loss nan, " in out[0]
    assert metrics(only_run(tmp_path))[-1]["loss"] is None


def test_a_resumed_run_knows_since_when_there_was_no_loss(tmp_path):
    run = run_of("--model", "mlp_8", "--learning-rate", "1e30", "--epochs", 2)
    advance(run, 16)
    found = evaluation(run)
    write_point(tmp_path, run)
    again = run_of("--model", "mlp_8", "--learning-rate", "1e30", "--epochs", 2)
    resume(tmp_path, again)
    assert why_not_finite(run, found)
    assert why_not_finite(again, found) == why_not_finite(run, found)
    flat = torch.load(tmp_path / "resume.pt", weights_only=True)
    del flat["finite_until"]  # a point of an earlier version
    torch.save(flat, tmp_path / "resume.pt")
    resume(tmp_path, again)
    assert "since step 17" in why_not_finite(again, found)


def test_a_batch_without_a_loss_that_was_skipped_is_no_divergence():
    run = run_of("--model", "mlp_8", "--microbatches", 2, "--agree", 1.9, "--epochs", 1)
    step = run.step
    run.step = lambda state, batch, **extra: step(state, (batch[0] * torch.nan, batch[1]), **extra)
    advance(run, 2)
    assert run.skipped.item() == 2
    assert why_not_finite(run, evaluation(run)) is None
    assert why_all_skipped(run) == "every step was skipped: the loss was never finite"
    run.step = step
    advance(run, 3)
    assert why_all_skipped(run) is None
