"""Train, write a checkpoint, and measure it: every model with every initialisation."""

import itertools
import json

import pytest

from _lab import command, metrics, only_run

EVERYDAY = ["resnet18_1", "cnn_1", "cnn5_1", "vit_8", "mlp_4", "wrn_10_1", "lenet"]
LARGE = [
    *("resnet18", "resnet34", "tv_resnet18", "tv_resnet34", "resnet18_64"),
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "cnn_64", "cnn5_64", "mlp_512"),
]
INITS = ["pytorch", "nkaiming", "fixup", "mfixup"]
NEED_32 = ("cnn_", "vgg", "lenet")


def cases(models):
    for model, init in itertools.product(models, INITS):
        if "res" in model or "wrn" in model or "fixup" not in init:
            yield model, init


@pytest.mark.parametrize(
    ("model", "init"),
    [
        *cases(EVERYDAY),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in cases(LARGE)),
    ],
)
def test_what_is_measured_is_what_was_trained(model, init, tmp_path):
    data = "synthetic-normal" if model.startswith(NEED_32) else "digits"
    place = ["--save-dir", tmp_path]
    if model.startswith("vgg"):  # at their usual width nothing else is measured, only longer
        place += ["--model-arguments", "width=8"]
    code, _, err = command(
        *("train", "--model", model, "--weight-init", init, "--data", data, "--label-noise", 0.2),
        *("--train-split", 20, "--batch-size", 10, "--steps", 1, "--log-level", "error", *place),
    )
    assert (code, err) == (0, "")
    run = only_run(tmp_path)
    options = [run, "--metric", "crossentropy", "--checkpoint", 0, 1]
    assert command("stats", *options, "--device", "cpu")[0] == 0
    for number, line in enumerate(metrics(run)):
        (file,) = (run / "stats").glob(f"*checkpoint-{number}.json")
        values = json.loads(file.read_text())["stats"]
        assert len(values) == 20
        assert sum(values) / 20 == pytest.approx(line["train_loss"], rel=1e-4)
