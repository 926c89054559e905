"""The examples train on tiny settings, and do what they say."""

import argparse
import importlib
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchvision import models
from torchvision.transforms.v2.functional import to_pil_image

import gradfilter as gf
from gradfilter import _tree, interop

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
NAMES = {path.stem for path in FILES} - {"_cifar"}
ALL, NONE = "2", "0"  # thresholds that accept every row, and none but the first


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Return a function that runs an example in an empty folder and returns its epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *options):
        module = importlib.import_module(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of frameworks, about a machine without a GPU
            module.main([*options])
        return epochs(capsys.readouterr().out)

    yield run
    for path in FILES:  # the names are of this folder only
        sys.modules.pop(path.stem, None)


def epochs(printed):
    """Return the numbers of each printed line of an epoch, by their names."""
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    found = [dict(re.findall(r"([a-z][a-z ]*?) (nan|[\d.]+)(?=[,)\s:]|$)", line)) for line in lines]
    return [{name.strip(): float(value) for name, value in each.items()} for each in found]


def small(num_classes):
    """A network in place of a ResNet, which takes a second per step."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, num_classes))


def check_trained(found, better=0.9):
    """The loss falls to a fraction of what it was, and rows are counted."""
    assert found[-1]["loss"] < better * found[0]["loss"]
    assert all(0 <= each["accepted"] <= 1 for each in found)


# --- The files ---


def test_the_examples_are_those_that_the_documentation_lists():
    listed = {*re.findall(r"\.\./examples/(\w+)\.py\)", (ROOT / "docs/examples.md").read_text())}
    assert listed == {path.stem for path in FILES}
    published = {"cifar100_step", "cifar100_train", "cifar100n"}
    trainers = {"plain_loop", "ddp", "fsdp2", "lightning_module", "hf_trainer", "imagenet_style"}
    assert published | trainers | {"ray_train"} == NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_short_and_says_how_to_start_it(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 120
    assert lines[0].startswith('"""')
    if path.stem in NAMES:
        docstring = path.read_text().split('"""')[1]
        assert re.search(
            rf"^    (python|torchrun .*) examples/{path.name}", docstring, re.MULTILINE
        )
        assert 'pip install "gradfilter[' in docstring
        assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]


# --- Loops and trainers ---


def test_the_plain_loop_rejects_more_wrong_labels_than_right_ones(example):
    found = example("plain_loop", "--epochs", "6")
    assert found[-1]["test accuracy"] > 0.8
    assert found[-1]["wrong labels"] < found[-1]["right labels"] - 0.1
    check_trained(example("plain_loop", "--epochs", "3", "--wrong", "0"), 0.5)


def test_the_plain_loop_skips_every_step_if_no_row_is_accepted(example):
    found = example("plain_loop", "--epochs", "2", "--threshold", NONE)
    assert [each["accepted"] for each in found] == [0, 0]
    assert found[0]["test accuracy"] == found[1]["test accuracy"]


@pytest.fixture
def alone(monkeypatch):
    """Set what torchrun sets, for a group of one process."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_process_trains_and_a_threshold_of_zero_rejects_all_rows_but_one(example, alone, name):
    check_trained(example(name, "--epochs", "3", "--save", "model.pt"), 0.7)
    assert torch.load("model.pt", weights_only=True)["0.weight"].shape == (128, 64)
    rows = ("--microbatches", "4", "--threshold", NONE)
    assert [each["accepted"] for each in example(name, "--epochs", "1", *rows)] == [0.25]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_torchrun_starts_them(name, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--epochs", "4", "--save", str(tmp_path / "model.pt")]
    done = subprocess.run(
        [sys.executable, *launch, EXAMPLES / f"{name}.py", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = epochs(done.stdout)
    assert len(found) == 4  # of one process only
    check_trained(found, 0.5)
    assert found[-1]["test accuracy"] > 0.8
    if name == "ddp":
        assert "2 processes, equal parameters: True" in done.stdout
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights["0.weight"].shape == (128, 64)  # whole, also if it was sharded


def digits_in_one_process(num_epochs):
    """The training of ray_train.py on the rows of all workers, without Ray and without a group."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))[:1200]
    x, y = torch.tensor(found.data, dtype=torch.float64)[order] / 16, torch.tensor(found.target)
    y = y[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rows_of = gf.microbatch_grads(gf.model_loss(model, nn.CrossEntropyLoss()), 4, plan="loop")
    shuffled, filters = torch.Generator().manual_seed(1), gf.agree_filter(0.97)
    rejected = 0
    for _ in range(num_epochs):
        for batch in torch.randperm(len(x), generator=shuffled).split(120):
            params = gf.extract(model)[0]
            grads, _, out = filters.update(rows_of(params, (x[batch], y[batch])), {}, params)
            for name, p in model.named_parameters():
                p.grad = grads[name]
            if out["keep"]:
                optimizer.step()
            rejected += int((~out["accepted"]).sum())
    assert rejected > 0
    return model.state_dict()


@pytest.mark.slow
def test_ray_train_on_two_workers_equals_one_process_with_all_rows(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    options = ["--workers", "2", "--epochs", "4", "--dtype", "float64", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ray_train.py", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = epochs(done.stdout)
    assert len(found) == 4
    check_trained(found, 0.5)
    folder = re.search(r"^checkpoint: (.*)$", done.stdout, re.MULTILINE)[1]
    weights = torch.load(Path(folder, "model.pt"), weights_only=True)
    expected = digits_in_one_process(4)
    torch.testing.assert_close(weights, dict(expected), rtol=1e-10, atol=1e-10)


# --- SkyPilot ---


def skypilot():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())


def test_the_task_of_skypilot_starts_an_example_by_torchrun():
    task = skypilot()
    assert {*task} == {"name", "workdir", "num_nodes", "resources", "setup", "run"}
    assert task["workdir"] == "." and task["num_nodes"] == 2
    assert task["run"].startswith("torchrun ")
    assert {*re.findall(r"SKYPILOT_\w+", task["run"])} == {*variables(0)}
    [script] = re.findall(r"examples/\w+\.py", task["run"])
    assert (ROOT / script).is_file()


def variables(rank):
    """What SkyPilot sets on a node, for two nodes with a process each that are this machine."""
    found = {"NUM_NODES": "2", "NODE_RANK": str(rank), "NUM_GPUS_PER_NODE": "1"}
    return {f"SKYPILOT_{n}": v for n, v in (found | {"NODE_IPS": "127.0.0.1\n127.0.0.1"}).items()}


@pytest.mark.slow
def test_the_command_for_skypilot_trains_on_two_nodes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "MASTER_PORT": port, "EPOCHS": "2", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            ["bash", "-c", skypilot()["run"]],
            cwd=ROOT,
            env=own | variables(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert len(epochs(said[0])) == 2 and not epochs(said[1])
    assert "2 processes, equal parameters: True" in said[0]


def test_the_lightning_module_trains_and_keeps_checkpoints(example, monkeypatch):
    pytest.importorskip("lightning")
    found = example("lightning_module", "--epochs", "3", "--out", "out")
    check_trained(found, 0.7)
    assert found[-1]["val accuracy"] > 0.6
    assert {path.name for path in Path("out").iterdir()} == {"best.ckpt", "last.ckpt"}
    rejected = example("lightning_module", "--epochs", "1", "--threshold", NONE, "--out", "none")
    assert rejected[0]["accepted"] == 0.25  # the first of four


def test_the_trainer_of_transformers_trains_and_keeps_a_checkpoint(example):
    pytest.importorskip("transformers")
    few = ("--samples", "512", "--lr", "0.005", "--wrong", "0")
    check_trained(example("hf_trainer", "--epochs", "3", *few, "--out", "out"))
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-24"]
    few = ("--samples", "64", "--threshold", NONE)
    [rejected] = example("hf_trainer", "--epochs", "1", *few, "--out", "none")
    assert rejected["accepted"] == 0.25


# --- Folders of images ---


@pytest.fixture
def folder(tmp_path):
    """Images of three classes; the class is the colour."""
    draws = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 4)):
        for c in range(3):
            place = tmp_path / "images" / part / f"class{c}"
            place.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(100, (3, 20, 20), generator=draws)
                image[c] += 120
                to_pil_image(image.to(torch.uint8)).save(place / f"{i}.png")
    return str(tmp_path / "images")


SMALL = "--model shufflenet_v2_x0_5 --batch-size 12 --microbatches 2 --image-size 32 --workers 0"
SMALL = (*SMALL.split(), "--lr", "0.05", "--ema", "0.5", "--threshold", ALL)


class Interrupted(Exception):
    """Somebody has stopped the training."""


def test_a_resumed_training_on_folders_equals_an_uninterrupted_one(example, folder, monkeypatch):
    options = (folder, *SMALL, "--amp", "--epochs", "2")
    whole = example("imagenet_style", *options, "--out", "whole")

    def stop(*_):
        replace(*_)
        raise Interrupted

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(Interrupted):
            example("imagenet_style", *options, "--out", "parts")
    rest = example("imagenet_style", *options, "--out", "parts")
    assert rest == whole  # with the line that was printed before the interruption
    parts, together = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("parts", "whole")
    )
    assert {*parts} == {"epoch", "model", "ema", "filtered", "scheduler"}
    for one, other in zip(_tree.leaves(parts), _tree.leaves(together), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_training_on_folders_learns_and_rejects(example, folder, monkeypatch):
    monkeypatch.setattr(models, "get_model", lambda name, num_classes: small(num_classes))
    found = example("imagenet_style", folder, *SMALL, "--epochs", "8", "--out", "all")
    check_trained(found, 0.9)
    assert found[-1]["accepted"] == 1 and found[-1]["val accuracy"] > 0.9
    none = (*SMALL, "--threshold", NONE)
    [rejected] = example("imagenet_style", folder, *none, "--epochs", "1", "--out", "none")
    assert rejected["accepted"] == 0.5


def test_a_compiled_training_on_folders_equals_one_that_is_not(example, folder, monkeypatch):
    monkeypatch.setattr(models, "get_model", lambda name, num_classes: small(num_classes))
    options = (folder, *SMALL, "--epochs", "2")
    plain = example("imagenet_style", *options, "--out", "plain")
    graph = example("imagenet_style", *options, "--compile", "graph", "--out", "graph")
    for one, other in zip(plain, graph, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)


# --- The published scripts ---


FLAGS = (
    "GAF learning_rate weight_decay batch_size num_val_epochs optimizer epochs "
    "num_batches_to_force_agreement num_samples_per_class_per_batch label_error_percentage "
    "cos_distance_thresh momentum nesterov betas eps alpha centered scheduler_patience "
    "scheduler_factor wandb verbose"
)
SETTINGS = (
    "epochs batch_size num_batches_to_force_agreement learning_rate momentum weight_decay "
    "cos_distance_thresh wandb verbose"
)
PUBLISHED = {
    "cifar100_step": {*FLAGS.split()},
    "cifar100_train": {*SETTINGS.split()},
    "cifar100n": {*FLAGS.split(), "dummy", "cifarn", "cifarn_noisy_data_file_path"},
}
FAST = ("--dummy", "True", "--num_val_epochs", "1", "--num_samples_per_class_per_batch", "5")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_flags_are_the_published_ones(example, name, monkeypatch):
    parsed = {}

    def parse(parser, argv):
        parsed.update(vars(parser.parse_known_args(argv)[0]))
        raise Interrupted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Interrupted):
        example(name)
    assert {*parsed} == PUBLISHED[name] | {"dummy"}
    defaults = {"learning_rate": 0.01, "weight_decay": 0.01, "batch_size": 128}
    defaults |= {"num_batches_to_force_agreement": 2, "wandb": False}
    if name == "cifar100_train":
        defaults |= {"epochs": 100, "momentum": 0.9, "cos_distance_thresh": 0.98, "verbose": True}
    else:
        defaults |= {"GAF": True, "epochs": 10000, "num_val_epochs": 2, "optimizer": "SGD"}
        defaults |= {"num_samples_per_class_per_batch": 1, "label_error_percentage": 0}
        defaults |= {"cos_distance_thresh": 1, "momentum": 0, "nesterov": False, "verbose": False}
        defaults |= {"betas": (0.9, 0.999), "eps": 1e-8, "alpha": 0.99, "centered": False}
        defaults |= {"scheduler_patience": 100, "scheduler_factor": 0.1}
    assert {key: parsed[key] for key in defaults} == defaults
    if name == "cifar100n":
        assert parsed["cifarn"] is True
        assert parsed["cifarn_noisy_data_file_path"] == "./examples/CIFAR-100_human.pt"


@pytest.fixture
def small_resnets(monkeypatch):
    """The models of the scripts, a thousandth of their size."""
    monkeypatch.setattr(models, "resnet18", small)


def test_the_loop_of_your_own_trains_with_and_without_the_filter(example, small_resnets):
    fast = (*FAST, "--learning_rate", "0.1", "--momentum", "0.9")
    check_trained(example("cifar100_step", *fast, "--epochs", "5"), 0.7)
    assert torch.load("checkpoints/cifar100_step.pt", weights_only=True)["5.bias"].shape == (4,)
    ordinary = (*fast, "--GAF", "False", "--batch_size", "10")  # not a multiple of the classes
    check_trained(example("cifar100_step", *ordinary, "--epochs", "4"), 0.7)


def test_the_threshold_reaches_the_filter(example, small_resnets):
    rejecting = (*FAST, "--epochs", "2", "--cos_distance_thresh", NONE)
    first, second = example("cifar100_step", *rejecting)
    assert first["accepted"] == second["accepted"] == 0


def test_a_plateau_lowers_the_learning_rate(example, small_resnets, monkeypatch):
    module, made = importlib.import_module("cifar100_step"), []
    make = module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda *a: made.append(make(*a)) or made[-1])
    plateau = ("--optimizer", "SGD+Nesterov+val_plateau", "--momentum", "0.9")
    still = (
        "--cos_distance_thresh",
        NONE,
        "--scheduler_patience",
        "1",
        "--label_error_percentage",
        "0.2",
    )
    example("cifar100_step", *FAST, "--epochs", "9", *plateau, *still, "--weight_decay", "0")
    assert made[0].param_groups[0]["lr"] < 0.01


def test_one_call_trains_as_the_package_does(example, small_resnets, monkeypatch):
    results = []
    train = interop.train_GAF
    monkeypatch.setattr(interop, "train_GAF", lambda *a, **k: results.extend(train(*a, **k)))
    size = ("--batch_size", "10", "--epochs", "6", "--learning_rate", "0.1")
    example("cifar100_train", "--dummy", "True", *size)
    assert [result["epoch"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert results[-1]["train_loss"] < 0.9 * results[0]["train_loss"]


def test_the_script_for_human_labels_trains(example, monkeypatch):
    module = importlib.import_module("cifar100n")
    network = module.network(100)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 100)
    assert sum(p.numel() for p in network.parameters()) == 21_328_292  # a ResNet34 for CIFAR
    monkeypatch.setattr(module, "network", small)
    fast = (*FAST, "--learning_rate", "0.1", "--momentum", "0.9")
    check_trained(example("cifar100n", *fast, "--epochs", "5"), 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100_step", "cifar100n"])
def test_the_models_of_the_scripts_train(example, name):
    check_trained(example(name, *FAST, "--epochs", "2", "--momentum", "0.9"), 0.9)


def test_human_labels_are_read_without_executing_code(example, monkeypatch):
    numpy = pytest.importorskip("numpy")
    module = importlib.import_module("cifar100n")
    torch.save({"noisy_label": numpy.array([3, 1, 4])}, "labels.pt")
    assert module.human_labels("labels.pt") == [3, 1, 4]
    torch.save({"noisy_label": numpy.array([3]), "code": print}, "code.pt")
    with pytest.raises(Exception, match="print"):
        module.human_labels("code.pt")


OPTIMIZERS = {
    "SGD": ("SGD", {"momentum": 0.5, "nesterov": False}),
    "SGD+Nesterov": ("SGD", {"momentum": 0.5, "nesterov": True}),
    "SGD+Nesterov+val_plateau": ("SGD", {"momentum": 0.5, "nesterov": True}),
    "Adam": ("Adam", {"betas": (0.9, 0.999), "eps": 1e-8}),
    "AdamW": ("AdamW", {"betas": (0.9, 0.999), "eps": 1e-8}),
    "RMSProp": ("RMSprop", {"momentum": 0.5, "alpha": 0.99, "centered": False}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_get_their_own_flags(example, name):
    shared = importlib.import_module("_cifar")
    args = shared.published_flags("").parse_args(["--optimizer", name, "--momentum", "0.5"])
    optimizer = shared.make_optimizer(torch.nn.Linear(2, 2), args)
    kind, options = OPTIMIZERS[name]
    options |= {"lr": 0.01, "weight_decay": 0.01}
    assert type(optimizer).__name__ == kind
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_microbatches_have_as_many_samples_of_every_class(example):
    shared = importlib.import_module("_cifar")
    members = [[0, 1, 2, 3], [4, 5], [6]]  # the last two classes have fewer than are needed
    first, second = shared.draw(members, 2, 2)
    for microbatch in (first, second):
        counts = [sum(i in own for i in microbatch) for own in members]
        assert counts == [2, 2, 2]
    assert {*first[:2], *second[:2]} == {*members[0]}  # no sample twice


def test_flipped_labels_are_wrong_in_number(example):
    shared = importlib.import_module("_cifar")
    labels = [i % 5 for i in range(100)]
    found = shared.flipped(labels, 0.2, 5)
    assert sum(a != b for a, b in zip(found, labels, strict=True)) == 20
    assert {*found} == {*range(5)}
    with pytest.raises(ValueError, match="label_error_percentage < 1, found 15"):
        shared.flipped(labels, 15, 5)
    assert math.isclose(sum(labels), 200)  # not changed
