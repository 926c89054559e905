"""A small run of `gradfilter train`, and its measurement by `gradfilter stats`."""

import json

import pytest

from _lab import command, only_run

TRAINING = ["--model", "mlp_8", "--epochs", "2", "--train-split", "100", "--label-noise", "0.3"]


def train(folder):
    """Train, and return the run directory with three checkpoints."""
    code, _, err = command("train", *TRAINING, "--save-dir", folder, "--save-checkpoint", 1)
    assert code == 0, err
    return only_run(folder)


def numbers(run, *args):
    """Measure the last checkpoint; return the only new file and its content."""
    folder = run / "stats"
    before = set(folder.glob("*.json")) if folder.exists() else set()
    code, _, err = command("stats", run, "--last", *args)
    assert code == 0, err
    (path,) = set(folder.glob("*.json")) - before
    return path, json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
