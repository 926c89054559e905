"""The progress line of a training: its parts, and when each is shown."""

import math
import re

import pytest

from _lab import command
from gradfilter.lab.train._evaluation import NUMBERS, Evaluation
from gradfilter.lab.train._progress import shown


def evaluation(**numbers):
    known = dict.fromkeys(NUMBERS, math.nan) | {"step": 40, "epoch": 2.0, "skipped": 0}
    return Evaluation(**known | {"train_accuracy": 0.5, "train_loss": 1.5, "loss": 1.25} | numbers)


def test_the_line_has_the_parts_that_the_run_has():
    assert shown(evaluation()) == "epoch 2, step 40: loss 1.2500, train 50.0 %"
    assert shown(evaluation(clipped_rows=0.123)).endswith("train 50.0 %, clipped rows 12.3 %")
    assert shown(evaluation(clipped_units=0.0)).endswith("train 50.0 %, clipped units 0.0 %")
    both = evaluation(accepted=1.0, clipped_rows=0.25, clipped_units=0.5, skipped=10)
    assert shown(both).endswith(
        "accepted rows 100.0 %, clipped rows 25.0 %, clipped units 50.0 %, skipped steps 25.0 %"
    )


@pytest.mark.parametrize(
    ("options", "part", "value"),
    [
        (("--clip-per-row", "1e-6"), "clipped rows", 100.0),
        (("--clip-per-row", "1e6"), "clipped rows", 0.0),
        (("--budget-clip", "1e-6", "--microbatches", "4"), "clipped rows", None),
        (("--centered-clip", "1e-6", "--microbatches", "4"), "clipped rows", 100.0),
        (("--agc", "1e-9"), "clipped units", None),
    ],
)
def test_a_training_with_a_clip_says_how_much_it_clips(tmp_path, options, part, value):
    short = ("--steps", "3", "--model", "mlp_4", "--save-dir", str(tmp_path))
    code, out, err = command("train", *short, *options)
    start, *_, end = [line for line in err.splitlines() if line.startswith("epoch")]
    assert code == 0
    assert "clipped" not in start  # before the first step
    (found,) = re.findall(rf"{part} (\d+\.\d) %", end)
    assert re.findall(rf"{part} (\d+\.\d) %", out) == [found]
    assert float(found) == value if value is not None else float(found) > 0


def test_a_training_without_a_clip_says_nothing_of_clips(tmp_path):
    short = ("--steps", "2", "--model", "mlp_4", "--save-dir", str(tmp_path))
    code, out, err = command("train", *short)
    assert code == 0 and "step 2" in err and "clipped" not in out + err
