"""What ``gradfilter stats`` refuses before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.stats._catalogue import METRICS
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._strategies import is_path

OF_SOME = sorted({name for metric in METRICS.values() for name in metric.takes} - {"batch_size"})
"""Settings that count for some metrics only; the others may not ignore them silently."""
AT_LEAST_ONE = ("batch_size", "num_directions", "num_power_iters")
NOT_NEGATIVE = ("skip", "mc_sample_seed")


def check_values(config: StatsConfig) -> None:
    """Refuse values that no run can make right.

    Raises:
        UsageError: A value is out of range, or two do not go together.
    """
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        check(value >= 1, _option(name), "at least 1", value, f"{_default(name)} is the default.")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        check(value >= 0, _option(name), "at least 0", value, f"{_default(name)} is the default.")
    for name in ("num_samples", "nsteps_per_epoch"):
        value = getattr(config, name)
        check(value is None or value >= 1, _option(name), "at least 1", value, "Or leave it away.")
    for number in config.checkpoint:
        check(number >= 0, "--checkpoint", "numbers from 0 on", number, "0 is the start.")
    check(
        not set(config.outname) & set('/\\:*?"<>|\0') and len(config.outname) <= 100,
        "--outname",
        "a short part of a file name",
        repr(config.outname),
        "The directory is always that of the run.",
    )
    check(config.num_probes >= 2, "--num-probes", "at least 2", config.num_probes, "32 is usual.")
    _check_metric(config)
    _check_together(config)


def _check_metric(config: StatsConfig) -> None:
    metric = METRICS[config.metric]
    for name in OF_SOME:
        value = getattr(config, name)
        if value != _default(name) and name not in metric.takes:
            users = ", ".join(m for m, other in METRICS.items() if name in other.takes)
            raise UsageError(
                f"{_option(name)}: {config.metric} does not depend on it. Leave it away, or "
                f"choose a --metric that does: {users}."
            )
    if config.metric == "agreement":
        check(
            config.microbatches >= 2,
            "--microbatches",
            "at least 2",
            config.microbatches,
            "8 is the default.",
        )
        check(
            config.batch_size % config.microbatches == 0,
            "--batch-size",
            f"a multiple of --microbatches {config.microbatches}",
            config.batch_size,
            f"{config.microbatches * math.ceil(config.batch_size / config.microbatches)} is one.",
        )
    if config.metric == "sharpness":
        check(0 < config.rho < math.inf, "--rho", "a positive number", config.rho, "0.05 is usual.")


def _check_together(config: StatsConfig) -> None:
    _refuse_ignored(config)
    stands = config.gen_strategy == "none"
    on_path = is_path(config.gen_strategy)
    refusals = [
        (
            METRICS[config.metric].per_batch and not stands,
            f"--gen-strategy: {config.metric} is measured on batches, not around images. "
            "Leave it away.",
        ),
        (
            (config.cumulative or config.raw_path) and not on_path,
            "--cumulative, --raw-path: there is no path in --gen-strategy "
            f"{config.gen_strategy}. Give shifts-path or svd-path.",
        ),
        (
            config.cumulative and config.raw_path,
            "--cumulative and --raw-path: running means and no means exclude each other. "
            "Choose one.",
        ),
        (
            config.target_logit_only and config.normalization == "crossentropy",
            "--target-logit-only: the cross-entropy is one output already. Leave it away, or "
            "choose another --normalization.",
        ),
        (
            config.metric == "tangent_jacobian" and config.normalization == "jacobian",
            "--normalization jacobian: tangent_jacobian compares outputs and has no Jacobian. "
            "Choose another, or --metric tangent_hessian.",
        ),
        (
            config.last and bool(config.checkpoint),
            "--last and --checkpoint: each says which checkpoint. Choose one.",
        ),
        (
            config.checkpoint_by_step and not config.checkpoint,
            "--checkpoint-by-step: there is no step. Give --checkpoint 800.",
        ),
        (
            config.nsteps_per_epoch is not None and not config.checkpoint_by_step,
            "--nsteps-per-epoch: it turns epochs into steps for --checkpoint-by-step, which is "
            "not given. Give both.",
        ),
        (
            config.run is not None
            and any(
                getattr(config, name) is not None
                for name in ("data", "model", "label_noise", "seed")
            ),
            "RUN and --data, --model, --label-noise, --seed: the directory says which run. "
            "Leave the others away.",
        ),
    ]
    for refused, line in refusals:
        if refused:
            raise UsageError(line)


def _refuse_ignored(config: StatsConfig) -> None:
    """Refuse what would change nothing beside the other settings."""
    metric = METRICS[config.metric]
    one_output = config.target_logit_only or config.normalization == "crossentropy"
    exact = ""
    if config.metric == "jacobian_operator_norm":
        exact = " by --method gram" if config.method == "gram" else " of one output" * one_output
    conditions = {
        "num_directions": (
            config.gen_strategy != "none",
            "there is no --gen-strategy to have directions",
        ),
        "num_power_iters": (not exact, f"{config.metric}{exact} is exact, and has no iterations"),
        "mc_sample_seed": (
            metric.draws and not exact,
            f"{config.metric}{exact} draws no random numbers",
        ),
        "bigmem": (
            metric.chunked and not one_output,
            "there are no classes to be computed in chunks",
        ),
        "restored_targets": (
            config.dataset_split == "train",
            f"labels of --dataset-split {config.dataset_split} are the true ones",
        ),
    }
    for name, (counts, why) in conditions.items():
        if getattr(config, name) != _default(name) and not counts:
            raise UsageError(f"{_option(name)}: {why}. Leave it away.")


def refuse_unread(config: StatsConfig, typed: Sequence[str]) -> None:
    """Refuse options that say where a run is that has been named.

    Args:
        config: What came of the options.
        typed: On the command line; the environment may say more than is asked for.

    Raises:
        UsageError: There is one.
    """
    given = {option.partition("=")[0] for option in typed}
    for name in ("--name", "--save-dir"):
        if config.run is not None and name in given:
            raise UsageError(f"RUN and {name}: the directory says which run. Leave {name} away.")


def _default(name: str) -> object:
    return next(field.default for field in fields(StatsConfig) if field.name == name)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
