"""Every option changes the training, or is refused, alone and with every other option."""

import dataclasses
import functools
import json
import math
import random

import pytest
import torch

from _lab import CLOCKS, command, metrics, only_run, refused
from gradfilter.lab._options import presets, read_settings
from gradfilter.lab._usage import UsageError, option_name
from gradfilter.lab.train import _build_training as _begin
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._config_checks import check_values, refuse_ignored
from gradfilter.lab.train._train import Watch, train_to_the_end
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._train_config import PLACE, WATCHING, TrainConfig

CPU = torch.device("cpu")
BASE = "--model mlp_4 --train-split 100 --val-split 30 --batch-size 24 --epochs 6"
OPTIONS = {
    "data": ("", "--data synthetic"),
    "data_split_seed": ("", "--data-split-seed 7"),
    "train_split": ("", "--train-split 80"),
    "val_split": ("", "--val-split 40"),
    "label_noise": ("", "--label-noise 0.3"),
    "noise_type": ("--label-noise 0.3", "--noise-type pairflip"),
    "label_seed": ("--label-noise 0.3", "--label-seed 7"),
    "model": ("", "--model mlp_5"),
    "model_additions": ("", "--model-additions dropout-0.2"),
    "model_arguments": ("", "--model-arguments depth=3"),
    "weight_init": ("", "--weight-init nkaiming"),
    "epochs": ("", "--epochs 5"),
    "steps": ("", "--steps 11"),
    "batch_size": ("", "--batch-size 12"),
    "microbatches": ("", "--microbatches 4"),
    "per_sample": ("", "--per-sample"),
    "samples_per_class": ("--batch-size None", "--samples-per-class 1"),
    "seed": ("", "--seed 3"),
    "optimizer": ("", "--optimizer adam"),
    "optimizer_arguments": (
        "--optimizer torch:Adagrad --learning-rate 0.01",
        "--optimizer-arguments initial_accumulator_value=0.5",
    ),
    "learning_rate": ("", "--learning-rate 0.2"),
    "momentum": ("", "--momentum 0.5"),
    "nesterov": ("", "--nesterov"),
    "betas": ("--optimizer adam", "--betas 0.5 0.9"),
    "eps": ("--optimizer adam", "--eps 0.1"),
    "alpha": ("--optimizer rmsprop", "--alpha 0.5"),
    "centered": ("--optimizer rmsprop", "--centered"),
    "weight_decay": ("", "--weight-decay 0.1"),
    "cautious": ("", "--cautious"),
    "schedule_free": ("", "--schedule-free"),
    "msam": ("", "--msam 0.5"),
    "schedule": ("", "--schedule cosine"),
    "lr_step": ("--schedule step --lr-step 1", "--lr-step 2"),
    "lr_decay_rate": ("--schedule step --lr-step 1", "--lr-decay-rate 0.5"),
    "lr_min": ("--schedule linear", "--lr-min 0.02"),
    "lr_power": ("--schedule poly", "--lr-power -1"),
    "lr_patience": ("--schedule plateau --lr-patience 0 --learning-rate 1e-9", "--lr-patience 1"),
    "lr_warmup_epochs": ("", "--lr-warmup-epochs 1"),
    "lr_warmup_initial": ("--lr-warmup-epochs 1", "--lr-warmup-initial 0.01"),
    "agree": ("--microbatches 4", "--agree 1.1"),
    "against": ("--microbatches 4 --agree 1.1", "--against first"),
    "average": ("--microbatches 4 --agree 1.5", "--average halving"),
    "consensus": ("--microbatches 4", "--consensus 0.8"),
    "consensus_hard": ("--microbatches 4 --consensus 0.8", "--consensus-hard"),
    "agree_per": ("--microbatches 4 --agree 0.9", "--agree-per leaf"),
    "agree_exclude": ("--microbatches 4 --agree 0.9", "--agree-exclude head.*"),
    "trimmed_mean": ("--microbatches 4", "--trimmed-mean 1"),
    "coordinate_median": ("--microbatches 4", "--coordinate-median"),
    "geometric_median": ("--microbatches 4", "--geometric-median"),
    "centered_clip": ("--microbatches 4", "--centered-clip 0.1"),
    "clip_per_row": ("", "--clip-per-row 0.1"),
    "clip_quantile": ("", "--clip-quantile 0.3"),
    "clip_smallest": ("--microbatches 4", "--clip-smallest"),
    "clip_per_leaf": ("--clip-per-row 0.1", "--clip-per-leaf"),
    "normalize_rows": ("--microbatches 4", "--normalize-rows 0.1"),
    "outlier_filter": ("--microbatches 4", "--outlier-filter 1.05"),
    "trim_losses": ("--microbatches 4", "--trim-losses 0.3"),
    "reference": ("--microbatches 4", "--reference average"),
    "reference_samples": ("--microbatches 4 --reference clean", "--reference-samples 7"),
    "spike_clip": ("--steps 40", "--spike-clip 0.1"),
    "adagc": ("--steps 120", "--adagc 0.5"),
    "spike_skip": ("--steps 100", "--spike-skip 1"),
    "budget_clip": ("--microbatches 4", "--budget-clip 0.3"),
    "budget_power": ("--microbatches 4 --budget-clip 0.3", "--budget-power 1"),
    "agc": ("", "--agc 0.01"),
    "agc_eps": ("--agc 0.01", "--agc-eps 0.5"),
    "no_decay": ("--weight-decay 0.1", "--no-decay *.bias"),
    "agc_exclude": ("--agc 0.01", "--agc-exclude head.*"),
    "sam": ("", "--sam 0.1"),
    "adaptive": ("--sam 0.1", "--adaptive asam"),
    "m_sharpness": ("--sam 0.1 --microbatches 4", "--m-sharpness"),
    "friendly_sam": ("--sam 0.1", "--friendly-sam 0.9"),
    "look_sam": ("--sam 0.1", "--look-sam 3"),
    "gsam": ("--sam 0.1", "--gsam 0.4"),
    "rho_schedule": ("--sam 0.1 --schedule linear", "--rho-schedule proportional"),
    "rho_min": ("--sam 0.1 --schedule linear --rho-schedule proportional", "--rho-min 0.05"),
    "label_smoothing": ("", "--label-smoothing 0.1"),
    "ema": ("", "--ema 0.5"),
    "eval_every": ("", "--eval-every 0.5"),
    "early_exit_accuracy": ("", "--early-exit-accuracy 0.01"),
    "early_exit_loss": ("", "--early-exit-loss 100"),
    "save_checkpoint": ("", "--save-checkpoint 1"),
    "dtype": ("", "--dtype float64"),
    "amp": ("", "--amp bf16"),
}
"""What an option needs, and the option with a value that is not the default."""
ELSEWHERE = {
    *(set(PLACE) | set(WATCHING)) - {"eval_every"},  # where and how, and no numbers
    *("noise_file", "image_size", "augmentation", "crop_flipped_only"),  # need files
    "compile",  # other kernels for the same numbers
}
LONG = ("spike_clip", "adagc", "spike_skip")
"""Options without an effect in the first 25 steps, which is as long as these trainings are."""
DAILY = 2
"""Options that each other one is combined with every day; all 3,500 pairs take some minutes."""


def test_every_option_is_here():
    assert {*OPTIONS} | ELSEWHERE == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.fixture(autouse=True)
def _kept_data(monkeypatch):
    """Every data set is made once."""
    monkeypatch.setattr(_begin, "load_data", _load)


@functools.cache
def _load(name, **settings):
    from gradfilter.lab.data._load import load_data

    return load_data(name, **settings)


@functools.cache
def trained(*typed):
    """Return the numbers of a training, without clocks and directories.

    Raises:
        UsageError: It is refused.
    """
    config = parse_train(typed).settings
    check_values(config)
    refuse_ignored(config, typed[len(BASE.split()) :])
    run = build_training(config, CPU)
    left = []

    def evaluated(evaluation):
        numbers = dataclasses.asdict(evaluation)
        left.append([v for k, v in numbers.items() if k not in CLOCKS and not math.isnan(v)])

    def saved(run):
        left.append((run.done, [t.double().sum().item() for t in run.measured["params"].values()]))

    train_to_the_end(run, Watch(evaluated=evaluated, checkpoint=saved), lambda: False)
    return left


def outcome(*typed):
    try:
        return trained(*" ".join(typed).split())
    except UsageError:
        return None


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_with_what_it_needs_changes_the_training(name):
    needs, text = OPTIONS[name]
    before, after = outcome(BASE, needs), outcome(BASE, needs, text)
    assert before is not None and after is not None and before != after


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_training_or_is_refused_beside_another(name):
    needs, text = OPTIONS[name]
    others = [other for other in OPTIONS if f"{option_name(other)} " not in f"{needs} {text} "]
    others = [other for other in others if other not in LONG]
    if name.startswith("early_exit"):  # both stop at the first evaluation, which is saved anyway
        ends = ("early_exit_accuracy", "early_exit_loss", "save_checkpoint")
        others = [other for other in others if other not in ends]
    for other in random.Random(name).sample(others, DAILY):
        before = outcome(BASE, needs, text)
        after = outcome(BASE, needs, text, OPTIONS[other][1])
        assert before is not None and after != before, (OPTIONS[other][1], "with", needs, text)


# Options that did nothing

IGNORED = {
    "--sam 0.05 --rho-min 0.02": "--rho-min: it would change nothing without --rho-schedule",
    "--sam 0.05 --rho-schedule proportional": "without a learning rate that moves",
    "--sam 0.05 --m-sharpness": "--m-sharpness: it would change nothing without several rows",
    "--label-seed 3": "--label-seed: it would change nothing without --label-noise",
    "--data-dir there": "--data-dir: it would change nothing without --data cifar10",
    "--data synthetic --data-split-seed 3": "--data-split-seed: it would change nothing without",
    "--agc 0 --agc-eps 0.1": "--agc-eps: it would change nothing without --agc above 0",
    "--no-decay *.bias": "--no-decay: it would change nothing without --weight-decay above 0",
    "--weight-decay 0.1 --no-decay *.bais": "--no-decay: expected patterns of names of parameters",
    "--agc 0.1 --agc-exclude haed.*": "--agc-exclude: expected patterns of names of parameters",
    "--agree 0.9 --microbatches 4 --agree-exclude haed.*": "--agree-exclude: expected patterns of",
    "--agree 0.9 --microbatches 4 --agree-exclude *": "--agree-exclude: expected patterns that",
    "--amp bf16 --dtype float64": "--amp bf16: mixed precision leaves --dtype float64 as it is",
    "--lr-warmup-epochs 0.001": "--lr-warmup-epochs: expected at least one step, found 0.001 (0",
    "--schedule step": "--schedule: it would change nothing in a training that ends before",
    "--schedule step --lr-step 9 --epochs 9": "ends before the first drop. Give a smaller",
    "--schedule plateau --epochs 9": "ends before the first drop",
    "--epochs 5 --steps 10": "--epochs: it would change nothing with --steps, which sets the",
}


@pytest.mark.parametrize("options", IGNORED)
def test_what_would_do_nothing_is_refused(options):
    assert IGNORED[options] in refused("train", "--model", "mlp_2", *options.split())


def test_a_value_is_no_option_whatever_it_is_called(tmp_path):
    options = ["--model", "mlp_2", "--steps", 1, "--save-dir", tmp_path]
    assert command("train", *options, "--name", "epochs")[0] == 0


def test_what_would_do_nothing_is_refused_in_a_file_too(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[train]\nsam = 0.05\nrho_min = 0.02\n")
    assert "--rho-min: it would change nothing" in refused("train", "--config", file)
    # A file may say what is the default anyway, and a preset is changed by what is typed.
    file.write_text("[train]\nbetas = [0.9, 0.999]\nsteps = 1\nmodel = 'mlp_2'\n")
    assert command("train", "--config", file, "--save-dir", tmp_path)[0] == 0


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_nothing_that_does_nothing(name):
    settings = read_settings(name, None, "train")
    if settings:
        typed = [option_name(setting) for setting in settings]
        refuse_ignored(parse_train(["--preset", name]).settings, typed)


def test_a_radius_that_follows_the_learning_rate_is_none_before_the_first_step(tmp_path):
    options = ["--sam", 0.1, "--rho-min", 0.02, "--rho-schedule", "proportional"]
    options += ["--schedule", "linear", "--epochs", 2, "--save-dir", tmp_path]
    code, _, err = command("train", "--model", "mlp_2", *options)
    assert code == 0, err
    first, *others = metrics(only_run(tmp_path))
    assert first["rho"] is None and first["lr"] is None
    assert all(0.02 <= line["rho"] <= 0.1 for line in others)


def test_nesterov_has_its_name_in_files_and_in_the_help(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[train]\noptimizer = "sgd+nesterov"\nsteps = 1\nmodel = "mlp_2"\n')
    assert command("train", "--config", file, "--save-dir", tmp_path)[0] == 0
    settings = json.loads((only_run(tmp_path) / "config.json").read_text())["settings"]
    assert settings["optimizer"] == "sgd" and settings["nesterov"] is True
    assert "sgd+nesterov" in " ".join(command("train", "--help")[1].split())
