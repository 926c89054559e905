"""What ``gradfilter train`` refuses before anything is done."""

from __future__ import annotations

import math
import os
from pathlib import Path

from gradfilter.lab._usage import UsageError, check, refuse_odd
from gradfilter.lab.train._config import TrainConfig

POSITIVE = (
    *("epochs", "resume_every", "image_size", "learning_rate", "eval_every", "lr_step"),
    *("agc_eps", "eps"),
)
POSITIVE_IF_GIVEN = (
    *("clip_per_row", "budget_clip", "sam", "early_exit_accuracy", "steps", "samples_per_class"),
)
NOT_NEGATIVE = (
    *("seed", "label_seed", "data_split_seed", "workers", "weight_decay", "lr_min", "lr_patience"),
    *("lr_warmup_epochs", "lr_warmup_initial", "rho_min", "budget_power"),
)
NOT_NEGATIVE_IF_GIVEN = ("agc", "gsam", "early_exit_loss", "train_split", "val_split")
FRACTIONS = ("label_noise", "label_smoothing", "alpha")


IN_EPOCHS = ("epochs", "eval_every", "lr_step", "lr_warmup_epochs")
LONGEST = 1e9
"""Epochs, so that their steps can be counted."""
MOST = 2**24
"""Rows, and samples of a class in one."""


def check_values(config: TrainConfig) -> None:
    """Refuse values that no data set and no model can make right.

    Raises:
        UsageError: A value is out of range, or two do not go together.
    """
    _check_ranges(config)
    _check_distances(config)
    _check_together(config)


def _check_ranges(config: TrainConfig) -> None:
    for name in POSITIVE:
        value = getattr(config, name)
        check(0 < value < math.inf, option(name), "a positive number", value, "")
    for name in POSITIVE_IF_GIVEN:
        value = getattr(config, name)
        fits = value is None or 0 < value < math.inf
        check(fits, option(name), "a positive number", value, "Leave it away to have none.")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        check(0 <= value < math.inf, option(name), "at least 0", value, "")
    for name in NOT_NEGATIVE_IF_GIVEN:
        value = getattr(config, name)
        fits = value is None or 0 <= value < math.inf
        check(fits, option(name), "at least 0", value, "Leave it away to have none.")
    for name in FRACTIONS:
        value = getattr(config, name)
        check(0 <= value < 1, option(name), "a fraction in [0, 1)", value, "")
    refuse_odd(config)
    accuracy = config.early_exit_accuracy
    check(
        accuracy is None or accuracy <= 1,
        "--early-exit-accuracy",
        "a fraction in (0, 1]",
        accuracy,
        "0.99 is 99 % of the training labels.",
    )
    for name in ("train_split", "val_split"):
        value = getattr(config, name)
        check(
            value != 1,
            option(name),
            "a fraction below 1, or a number of samples above 1",
            value,
            "Leave it away to take what there is.",
        )
    outside = Path(config.name).is_absolute() or ".." in Path(config.name).parts
    check(not outside, "--name", "a folder inside --save-dir", config.name, "")
    names = [len(os.fsencode(part)) for part in Path(config.name).parts]
    fits = config.name.isprintable() and max(names, default=0) <= 255
    fix = "It names a folder."
    check(fits, "--name", "at most 255 bytes of text that can be shown", repr(config.name), fix)
    for beta in config.betas:
        check(0 <= beta < 1, "--betas", "two numbers in [0, 1)", config.betas, "")
    check(config.microbatches >= 1, "--microbatches", "at least 1", config.microbatches, "")
    check(
        0 < config.lr_decay_rate < 1,
        "--lr-decay-rate",
        "a factor between 0 and 1",
        config.lr_decay_rate,
        "0.1 is the default.",
    )
    check(config.lr_power <= 0, "--lr-power", "at most 0", config.lr_power, "-0.5 is the default.")
    check(
        config.momentum is None or 0 <= config.momentum < 1,
        "--momentum",
        "a number in [0, 1)",
        config.momentum,
        "",
    )
    check(
        config.ema is None or 0 <= config.ema < 1,
        "--ema",
        "a decay in [0, 1)",
        config.ema,
        "Leave it away to have none.",
    )
    for epoch in config.save_checkpoint:
        fits = 0 < epoch <= LONGEST
        fix = "The first and the last are always saved."
        check(fits, "--save-checkpoint", f"epochs above 0, at most {LONGEST:g}", epoch, fix)
    for name in IN_EPOCHS:
        value = getattr(config, name)
        check(value <= LONGEST, option(name), f"at most {LONGEST:g}", value, "Take a smaller one.")
    count = config.samples_per_class or 1
    check(count <= MOST, "--samples-per-class", f"at most {MOST}", count, "Take fewer.")
    check(config.microbatches <= MOST, "--microbatches", f"at most {MOST}", config.microbatches, "")


def _check_distances(config: TrainConfig) -> None:
    for name in ("agree", "consensus"):
        value = getattr(config, name)
        check(
            value is None or 0 <= value <= 2,
            option(name),
            "a cosine distance in [0, 2]",
            value,
            "0.97 is usual, 2 accepts everything.",
        )


def _check_together(config: TrainConfig) -> None:
    rows = f"--microbatches {config.microbatches}"
    several = config.per_sample or config.microbatches > 1
    refusals = [
        (
            config.agree is not None and config.consensus is not None,
            "--agree and --consensus: both make one gradient of all rows. Choose one.",
        ),
        (
            (config.agree is not None or config.consensus is not None) and not several,
            f"--agree, --consensus: expected several rows to compare, found {rows}. "
            "Give --microbatches 8, or --per-sample.",
        ),
        (
            config.budget_clip is not None and not several,
            f"--budget-clip: expected several rows to share it, found {rows}. "
            "Give --microbatches 8, or --per-sample.",
        ),
        (
            config.budget_clip is not None and config.clip_per_row is not None,
            "--budget-clip, --clip-per-row: both limit the norms of rows. Choose one.",
        ),
        (
            config.per_sample and config.microbatches > 1,
            f"--per-sample: one row per sample and {rows} exclude each other. Choose one.",
        ),
        (
            config.consensus_hard and config.consensus is None,
            "--consensus-hard: there is no --consensus to be hard. Give --consensus 0.95.",
        ),
        (
            config.gsam is not None and config.sam is None,
            "--gsam: it decomposes the gradient that --sam takes. Give --sam 0.05, too.",
        ),
        (
            config.sam is None
            and (config.adaptive is not None or config.m_sharpness or _rho_moves(config)),
            "--adaptive, --m-sharpness, --rho-schedule, --rho-min: they shape --sam, which is not "
            "given. Give --sam 0.05.",
        ),
        (
            config.sam is not None and config.rho_min > config.sam,
            f"--rho-min: expected at most --sam {config.sam}, found {config.rho_min}.",
        ),
        (
            config.nesterov and (config.optimizer != "sgd" or config.momentum == 0),
            "--nesterov: expected --optimizer sgd with momentum above 0. Leave it away, or change "
            "those.",
        ),
        (
            config.lr_min > config.learning_rate,
            f"--lr-min: expected at most --learning-rate {config.learning_rate}, found "
            f"{config.lr_min}.",
        ),
        (
            config.batch_size is not None and config.samples_per_class is not None,
            "--batch-size and --samples-per-class: each says how large a batch is. Choose one.",
        ),
        (
            config.amp != "none" and config.dtype == "float64",
            f"--amp {config.amp}: mixed precision leaves --dtype float64 as it is. Choose one.",
        ),
        (
            config.crop_flipped_only and not config.augmentation,
            "--crop-flipped-only: it is a kind of --augmentation, which is not given. Give both.",
        ),
    ]
    for refused, line in refusals:
        if refused:
            raise UsageError(line)


def _rho_moves(config: TrainConfig) -> bool:
    return config.rho_schedule != "constant" or config.rho_min > 0


def option(name: str) -> str:
    """How a field is called on the command line."""
    return f"--{name.replace('_', '-')}"
