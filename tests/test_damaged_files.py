"""One file of a run directory is damaged: every command says so in one line, or does not need it."""

import json
import random
import shutil

import pytest
import torch
from tests._damage import damage
from tests._lab import command, only_run
from tests._stats_run import train

from gradfilter.lab.report import _report
from gradfilter.lab.stats._output import read
from gradfilter.lab.stats._parts import appending, part_path
from gradfilter.lab.train._archive import NAME

CASES = range(400)
TRAINING = ["--model", "mlp_8", "--epochs", "2", "--train-split", "100", "--label-noise", "0.3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was interrupted at its end, with numbers, half of other numbers, and a report."""
    root = tmp_path_factory.mktemp("whole")
    run = train(root)
    record = (run / "config.json").read_text()
    (run / "config.json").write_text(record.replace('"finished"', '"interrupted"'))
    assert command("stats", run, "--last", "--num-samples", 10)[0] == 0
    (measured,) = (run / "stats").iterdir()
    facts = read(measured)["metadata"]
    path = part_path(run / "stats", "confidence-train-checkpoint-2-id-0-10", 0)
    print(facts, path, appending)
    return root


def test_x(whole):
    print([str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()])
    import time
    for args in (["train", *TRAINING, "--save-dir", whole, "--save-checkpoint", 1, "--resume"], ["stats", only_run(whole), "--last"], ["report", whole]):
        a=time.time()
        print(command(*args), time.time()-a)
    assert 0
