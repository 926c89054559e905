"""Every option of stats changes the measurement, or is refused, alone and with other options."""

import dataclasses
import functools
from typing import get_args

import pytest
import torch

from _lab import command, refused
from _stats_run import train
from gradfilter.lab._options import parse
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._measurement import Measurement
from gradfilter.lab.stats._metrics import measure_of
from gradfilter.lab.stats._recorder import recorder
from gradfilter.lab.stats._stats_config import MetricName, StatsConfig, check_values
from gradfilter.lab.train._archive import ARCHIVE, checkpoints
from gradfilter.lab.train._restore import restored

AROUND = ["", "--gen-strategy shifts-path", "--target-logit-only", "--normalization softmax"]
OPTIONS = {
    "dataset_split": "--dataset-split test",
    "num_samples": "--num-samples 2",
    "skip": "--skip 4",
    "restored_targets": "--restored-targets",
    "gen_strategy": "--gen-strategy svd-25",
    "num_directions": "--num-directions 3",
    "cumulative": "--cumulative",
    "raw_path": "--raw-path",
    "normalization": "--normalization logsoftmax",
    "target_logit_only": "--target-logit-only",
    "num_power_iters": "--num-power-iters 2 --method power",
    "num_probes": "--num-probes 3",
    "legacy_scale": "--legacy-scale",
    "mc_sample_seed": "--mc-sample-seed 5 --method power",
    "microbatches": "--microbatches 4",
    "rho": "--rho 0.2",
}
ELSEWHERE = {
    *("run", "data", "model", "label_noise", "seed", "name", "save_dir", "data_dir"),  # which run
    *("checkpoint", "last", "checkpoint_by_step", "nsteps_per_epoch"),  # which of its checkpoints
    *("preset", "config", "outname", "device"),
    *("bigmem", "method"),  # other ways to the same numbers
    "batch_size",  # memory, but for metrics of batches
    "metric",  # all of them, below
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(place):
    return restored(place, checkpoints(place / ARCHIVE)[-1], device=torch.device("cpu"))


def test_every_option_is_here():
    fields = {field.name for field in dataclasses.fields(StatsConfig)}
    assert {*OPTIONS} | ELSEWHERE == fields and not {*OPTIONS} & ELSEWHERE


def outcome(model, *typed):
    """The numbers, or None where the options are refused."""
    config = parse(StatsConfig, "gradfilter stats", " ".join(typed).split())
    try:
        check_values(config)
    except UsageError:
        return None
    measurement = Measurement.of(config, model)
    samples, start = measurement.samples, measurement.start
    most = 4 if config.gen_strategy == "shifts-path" else 16  # a path has 33 images per sample
    stop = min(measurement.stop, start + most)
    return recorder(config, samples, measure_of(config, model))(start, stop)


def _flat(stats):
    return [x for part in stats for x in (_flat(part) if isinstance(part, list) else [part])]


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("metric", get_args(MetricName))
def test_an_option_changes_the_numbers_or_is_refused(metric, around, model):
    base = f"--metric {metric} --batch-size 8 {around}"
    measured = functools.cache(functools.partial(outcome, model))
    for name, text in OPTIONS.items():
        method = "--method power" if "--method" in text else ""
        before, after = measured(base, method), measured(base, text)
        # Between kinks the Jacobian of a ReLU network is constant, and differences of it are 0.
        flat = before is None or not any(_flat(before.stats))
        if flat or text.split()[0] in around:
            continue
        if metric == "agreement" and name == "microbatches":
            base += " --microbatches 8"
        assert after != before, (text, "with", base)


IGNORED = {
    "--num-directions 4": "--num-directions: there is no --gen-strategy",
    "--mc-sample-seed 4": "--mc-sample-seed: crossentropy draws no random numbers",
    "--metric jacobian_operator_norm --method gram --mc-sample-seed 4": "by --method gram draws",
    "--metric jacobian_operator_norm --method gram --num-power-iters 4": "gram is exact",
    "--metric jacobian_operator_norm --target-logit-only --mc-sample-seed 4": "of one output draws",
    "--bigmem": "--bigmem: there are no classes",
    "--metric jacobian --target-logit-only --bigmem": "--bigmem: there are no classes",
    "--restored-targets --dataset-split test": "are the true ones",
    "--save-dir there": "RUN and --save-dir: the directory says which run",
    "--save_dir there": "RUN and --save-dir: the directory says which run",
    "--name there": "RUN and --name: the directory says which run",
}


@pytest.mark.parametrize("options", IGNORED)
def test_what_would_do_nothing_is_refused(options, place):
    assert IGNORED[options] in refused("stats", place, "--last", *options.split())


def test_what_would_do_nothing_in_this_run_is_refused(tmp_path):
    options = ["--model", "mlp_2", "--steps", 1, "--log-level", "error", "--save-dir", tmp_path]
    assert command("train", *options)[0] == 0
    line = refused("stats", "--save-dir", tmp_path, "--last", "--restored-targets")
    assert "--restored-targets: the run has no wrong labels" in line
