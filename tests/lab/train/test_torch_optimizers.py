"""`gradfilter train --optimizer torch:NAME`: what the classes of torch get, do and leave."""

import json
import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradfilter as gf
from _lab import command, config, metrics, only_run, refused
from gradfilter.lab.data._batches import batches
from gradfilter.lab.train._build_training import build_training, schedule_of
from gradfilter.lab.train._config_checks import check_values, refuse_ignored
from gradfilter.lab.train._record import resume, write_point
from gradfilter.lab.train._run_place import place_of
from gradfilter.lab.train._torch_optimizers import (
    HOST,
    UNFIT,
    takes,
    torch_arguments,
    torch_class,
    torch_classes,
)
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._train_config import OPTIMIZERS, TrainConfig
from gradfilter.lab.train._training import advance

CPU = torch.device("cpu")
CLASSES = sorted(torch_classes())
SMALL = ["train", "--model", "mlp_8", "--train-split", 200, "--log-level", "error"]


def config_of(*options):
    return parse_train([str(option) for option in options]).settings


def built(name, *typed):
    """Return an optimizer of torch with the arguments that the options give."""
    settings = config_of("--optimizer", f"torch:{name}", *typed)
    p = torch.zeros(2, 2)
    return torch_class(settings)([p], lr=settings.learning_rate, **torch_arguments(settings))


# What a class gets


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_keeps_its_own_defaults_but_for_the_weight_decay(name):
    found = built(name, "--learning-rate", 0.01).defaults
    expected = torch_classes()[name]([torch.zeros(2, 2)], lr=0.01).defaults
    if "weight_decay" in expected:
        expected["weight_decay"] = 0.0
    assert found == expected


def test_options_keep_their_meaning_where_the_class_has_the_argument():
    sgd = built("SGD", "--momentum", 0.8, "--nesterov", "--weight-decay", 0.1).defaults
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.8, True, 0.1)
    radam = built("RAdam", "--betas", 0.5, 0.9, "--eps", 1e-3, "--learning-rate", 3e-4).defaults
    assert (radam["betas"], radam["eps"], radam["lr"]) == ((0.5, 0.9), 1e-3, 3e-4)
    rmsprop = built("RMSprop", "--alpha", 0.5, "--centered", "--momentum", 0.3).defaults
    assert (rmsprop["alpha"], rmsprop["centered"], rmsprop["momentum"]) == (0.5, True, 0.3)
    assert built("AdamW", "--weight-decay", 0.2).defaults["weight_decay"] == 0.2


def test_arguments_without_an_option_are_given_by_name():
    rprop = built("Rprop", "--optimizer-arguments", "etas=0.4,1.1").defaults
    assert rprop["etas"] == (0.4, 1.1)
    adagrad = built("Adagrad", "--optimizer-arguments", "eps=1e-8", "lr_decay=0.1").defaults
    assert (adagrad["eps"], adagrad["lr_decay"]) == (1e-8, 0.1)
    assert built("Adam", "--optimizer-arguments", "amsgrad=True").defaults["amsgrad"] is True
    adafactor = built("Adafactor", "--optimizer-arguments", "eps=none,1e-2").defaults
    assert adafactor["eps"] == (None, 0.01)


def test_a_decay_of_a_preset_or_file_that_a_class_does_not_take_is_refused_until_it_is_zero(
    tmp_path,
):
    file = tmp_path / "own.toml"
    file.write_text('[train]\nweight_decay = 0.5\noptimizer = "torch:Rprop"')
    for source in (
        ["--preset", "double-descent-digits", "--weight-decay", 0.5],
        ["--config", file],
    ):
        typed = [*source, "--optimizer", "torch:Rprop"]
        line = refused("train", *typed)
        assert "--weight-decay 0.5: torch:Rprop has no weight decay. Give --weight-decay 0" in line
        check_values(config_of(*typed, "--weight-decay", 0))
        refuse_ignored(config_of(*typed, "--weight-decay", 0), ["--weight-decay", "0"])
    check_values(config_of("--config", file, "--optimizer", "torch:RAdam"))


def test_no_other_rule_takes_arguments_as_torch_does():
    assert not any(takes(TrainConfig(optimizer=name), "betas") for name in OPTIMIZERS)


# Which classes there are


def test_the_classes_that_are_refused_do_not_fit_and_all_others_do():
    every = {n for n, c in vars(torch.optim).items() if isinstance(c, type)}
    every = {n for n in every if issubclass(getattr(torch.optim, n), torch.optim.Optimizer)}
    assert every == {*CLASSES, *UNFIT, "Optimizer"}
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    for name in UNFIT:
        with pytest.raises(ValueError, match=name):
            gf.from_torch(getattr(torch.optim, name), lr=0.1).init(params)


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_that_read_numbers_are_named(name):
    update = gf.from_torch(torch_classes()[name], lr=gf.schedules.cosine(0.1, 10))
    with FakeTensorMode():
        params = {"w": torch.ones(2, 2)}
        if f"torch:{name}" in HOST:
            with pytest.raises(RuntimeError, match="reads numbers on the host"):
                update.init(params)
        else:
            update.init(params)


# What a training does


# Rprop reads the learning rate once, and is refused with a schedule: see test_train_bad_input.py.
TRAINED = [(name, s) for s in ("constant", "cosine") for name in CLASSES]
TRAINED.remove(("Rprop", "cosine"))


@pytest.mark.parametrize(("name", "schedule"), TRAINED)
def test_a_training_is_that_of_torch(name, schedule):
    """The same batches, in a loop of torch that sets the learning rate in every step."""
    options = ["--model", "mlp_8", "--steps", 12, "--batch-size", 40, "--learning-rate", 1e-2]
    warm = ["--schedule", "cosine", "--lr-warmup-epochs", 0.1] if schedule == "cosine" else []
    settings = config_of(*options, *warm, "--optimizer", f"torch:{name}")
    run = build_training(settings, CPU)
    own = {key: p.clone().requires_grad_() for key, p in run.state["params"].items()}
    initial = {key: p.detach().clone() for key, p in own.items()}
    arguments = {"weight_decay": 0.0} if name == "AdamW" else {}
    optimizer = torch_classes()[name](list(own.values()), lr=1e-2, **arguments)
    rates = schedule_of(settings, 12, len(run.data.train) / 40)
    count = torch.zeros((), dtype=torch.int64)
    lr_state = rates.init(count)
    loss = torch.nn.CrossEntropyLoss()
    for k, (images, labels) in enumerate(batches(run.data.train, run.order(0, 12))):
        rate, lr_state = rates.at(count + k, lr_state)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.zero_grad()
        loss(torch.func.functional_call(run.model, own, (images,)), labels).backward()
        optimizer.step()
    advance(run, 12)
    for key, p in own.items():
        assert torch.equal(run.state["params"][key], p.detach()), key
        assert not torch.equal(initial[key], p.detach())


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_whole_run(name, tmp_path):
    schedule = [] if name == "Rprop" else ["--schedule", "cosine"]
    options = [*SMALL, "--optimizer", f"torch:{name}", "--learning-rate", 0.01, *schedule]
    settings = config_of(*options[1:], "--steps", 9, "--save-dir", tmp_path)
    whole, half, again = (build_training(settings, CPU) for _ in range(3))
    advance(whole, 9)
    advance(half, 4)
    write_point(tmp_path, half)
    resume(tmp_path, again)
    assert again.done == 4
    advance(again, 9)
    expected, found = gf.state_dict(whole.state), gf.state_dict(again.state)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# Files and other commands


def test_a_run_directory_has_a_name_that_every_file_system_takes(tmp_path):
    options = ["--optimizer", "torch:Adagrad", "--optimizer-arguments", "eps=1e-6", "lr_decay=0.1"]
    assert command(*SMALL, "--steps", 3, *options, "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    assert all(re.fullmatch(r"[\w.+-]+", part) for part in run.relative_to(tmp_path).parts)
    assert "optimizer-torch-Adagrad-optimizer-arguments-eps-1e-6-lr_decay-0.1" in str(run)
    settings = config(run)["settings"]
    assert settings["optimizer"] == "torch:Adagrad"
    assert settings["optimizer_arguments"] == ["eps=1e-6", "lr_decay=0.1"]
    assert metrics(run)[-1]["lr"] == pytest.approx(0.05)


def test_a_printed_configuration_is_read_again(tmp_path):
    options = ["--optimizer", "torch:Rprop", "--optimizer-arguments", "etas=0.4,1.1"]
    code, out, _ = command(*SMALL, *options, "--print-config")
    assert code == 0
    file = tmp_path / "own.toml"
    file.write_text(out)
    assert parse_train(["--config", str(file)]).settings == config_of(*SMALL[1:], *options)


def test_a_run_from_before_these_options_is_resumed(tmp_path):
    options = [*SMALL, "--steps", 6, "--save-dir", tmp_path]
    assert command(*options)[0] == 0
    run = only_run(tmp_path)
    record = config(run)
    del record["settings"]["optimizer_arguments"]
    record["status"] = "stopped"
    (run / "config.json").write_text(json.dumps(record))
    code, _, err = command(*options, "--resume")
    assert code == 0, err
    again = [*options, "--resume", "--optimizer", "torch:SGD"]
    assert place_of(config_of(*again[1:])) != run


def test_a_recorded_class_that_is_not_here_is_refused_in_one_line(tmp_path):
    assert command(*SMALL, "--steps", 2, "--save-dir", tmp_path)[0] == 0
    run = only_run(tmp_path)
    record = config(run)
    record["settings"]["optimizer"] = "torch:OfTheFuture"
    (run / "config.json").write_text(json.dumps(record))
    line = refused("stats", run, "--last", "--metric", "crossentropy")
    assert "--optimizer: expected torch: and one of ASGD" in line


def test_sweep_stats_and_report_take_runs_of_torch(tmp_path):
    grid = ["--grid", "optimizer=torch:RAdam,sgd", "seed=0,1"]
    shared = ["--model", "mlp_4", "--train-split", 200, "--steps", 4, "--save-dir", tmp_path]
    code, out, err = command("sweep", *grid, "--name", "study", "--", *shared)
    assert code == 0, err
    assert "torch:RAdam" in out
    code, out, err = command("runs", tmp_path)
    assert code == 0, err
    assert "torch:RAdam 0.05" in out
    run = next(path.parent for path in tmp_path.rglob("config.json") if "RAdam" in str(path))
    code, out, err = command("stats", run, "--last", "--metric", "crossentropy")
    assert code == 0, err
    code, out, err = command("report", tmp_path, "--out", tmp_path / "report")
    assert code == 0, err
    text = (tmp_path / "report" / "index.html").read_text()
    assert "torch:RAdam" in text
    names = [path.name for path in (tmp_path / "report").rglob("*")]
    assert not any(":" in name for name in names)


def test_a_sweep_refuses_what_a_training_refuses():
    line = refused("sweep", "--grid", "optimizer=torch:LBFGS,sgd", "--name", "study")
    assert "torch:LBFGS evaluates the loss several times" in line
    line = refused("sweep", "--grid", "optimizer=torch:Adagrad", "eps=1,2", "--name", "study")
    assert "--grid: --eps: it would change nothing with a class of torch" in line


def test_a_learning_rate_is_found_for_a_class_of_torch(tmp_path):
    options = ["--model", "mlp_16", "--rates", 40, "--optimizer", "torch:Adamax"]
    code, _, err = command("find-lr", *options, "--out", tmp_path / "rates")
    assert code in (0, 1), err
    found = json.loads((tmp_path / "rates" / "find-lr.json").read_text())
    assert found["settings"]["optimizer"] == "torch:Adamax"
    assert len(set(found["losses"])) > 20 and all(map(math.isfinite, found["losses"]))
    line = refused("find-lr", "--optimizer", "torch:Rprop")
    assert "--optimizer: expected an update rule that reads the learning rate in every step" in line


@pytest.mark.parametrize("name", sorted({*CLASSES} - {"Rprop"}))
def test_float64_and_a_chain_of_other_transforms(name):
    options = ["--model", "mlp_8", "--microbatches", 4, "--agree", 1.2, "--agc", 0.1, "--steps", 5]
    settings = config_of(
        *options,
        "--ema",
        0.9,
        "--dtype",
        "float64",
        "--learning-rate",
        0.01,
        "--optimizer",
        f"torch:{name}",
    )
    run = build_training(settings, CPU)
    advance(run, 5)
    for p in run.state["params"].values():
        assert p.dtype == torch.float64 and p.isfinite().all()


def test_the_help_names_every_rule_and_says_what_a_class_gets():
    text = " ".join(command("train", "--help")[1].split())
    assert all(f" {name}" in text for name in OPTIMIZERS)
    assert "torch:NAME, a class of torch.optim such as torch:RAdam" in text
    assert "gets the learning rate and the weight decay of the options, and keeps its own" in text
