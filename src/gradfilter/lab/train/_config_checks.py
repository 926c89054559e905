"""Refuse training options that are wrong, that contradict each other, or that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from gradfilter.lab._constraints import check_fields
from gradfilter.lab._usage import UsageError, option_name, refuse_odd, typed_names
from gradfilter.lab.train._train_config import TrainConfig

# --- Options that are wrong or contradict each other ---


def check_values(config: TrainConfig) -> None:
    """Refuse values that are wrong for every data set and model.

    Raises:
        UsageError: A value is out of range, or two values exclude each other.
    """
    check_fields(config)
    refuse_odd(config)
    _check_together(config)


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
            "--gsam: it decomposes the gradient that --sam takes. Also give --sam 0.05.",
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
            "--nesterov: expected --optimizer sgd with momentum above 0. Omit it, or change those.",
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


# --- Options without effect: a user who types an option expects an effect ---


@dataclass(frozen=True)
class OptionUse:
    """A condition under which an option has an effect.

    Attributes:
        reason: Why the option has no effect where the condition fails, in words of the command
            line: "without --agree".
        counts: Returns True where the option has an effect.
        fix: Advice for the user where it has none.
    """

    reason: str
    counts: Callable[[TrainConfig], bool]
    fix: str = "Omit it, or also give that."


def _moves(config: TrainConfig) -> bool:
    """Return whether the learning rate moves."""
    return config.schedule != "constant" or config.lr_warmup_epochs > 0


def _reaches_a_drop(config: TrainConfig) -> bool:
    """Return whether step or plateau may reach its first drop; steps depend on the data set."""
    waits = {"step": config.lr_step + config.lr_warmup_epochs, "plateau": config.lr_patience + 2}
    return config.steps is not None or waits.get(config.schedule, 0.0) < config.epochs


def _splits(config: TrainConfig) -> bool:
    """Return whether samples are split at random."""
    return config.data == "digits" or bool(config.train_split) or bool(config.val_split)


ADAM = OptionUse(
    "without --optimizer adam, adamw or per_example_adam",
    lambda c: c.optimizer.endswith(("adam", "adamw")),
)
RMSPROP = OptionUse("without --optimizer rmsprop", lambda c: c.optimizer == "rmsprop")
AGREE = OptionUse("without --agree", lambda c: c.agree is not None)
AGC = OptionUse("without --agc above 0", lambda c: bool(c.agc))
NOISE = OptionUse("without --label-noise", lambda c: c.label_noise > 0)
CIFAR = OptionUse(
    "without --data cifar10, cifar100 or cifar100n-fine", lambda c: c.data.startswith("cifar")
)
LONG = OptionUse(
    "in a training that ends before the first drop",
    _reaches_a_drop,
    "Give a smaller --lr-step or --lr-patience, or more --epochs.",
)

USES: Mapping[str, tuple[OptionUse, ...]] = {
    "momentum": (
        OptionUse(
            "without --optimizer sgd or rmsprop", lambda c: c.optimizer in ("sgd", "rmsprop")
        ),
    ),
    "betas": (ADAM,),
    "eps": (OptionUse("with --optimizer sgd", lambda c: c.optimizer != "sgd"),),
    "alpha": (RMSPROP,),
    "centered": (RMSPROP,),
    "schedule": (LONG,),
    "lr_step": (OptionUse("without --schedule step", lambda c: c.schedule == "step"), LONG),
    "lr_decay_rate": (
        OptionUse(
            "without --schedule step or plateau", lambda c: c.schedule in ("step", "plateau")
        ),
        LONG,
    ),
    "lr_min": (
        OptionUse("without --schedule other than constant", lambda c: c.schedule != "constant"),
        LONG,
    ),
    "lr_power": (OptionUse("without --schedule poly", lambda c: c.schedule == "poly"),),
    "lr_patience": (
        OptionUse("without --schedule plateau", lambda c: c.schedule == "plateau"),
        LONG,
    ),
    "lr_warmup_initial": (
        OptionUse("without --lr-warmup-epochs", lambda c: c.lr_warmup_epochs > 0),
    ),
    "budget_power": (OptionUse("without --budget-clip", lambda c: c.budget_clip is not None),),
    "against": (AGREE,),
    "average": (AGREE,),
    "agc_eps": (AGC,),
    "agc_exclude": (AGC,),
    "m_sharpness": (
        OptionUse(
            "without several rows, of --microbatches or --per-sample",
            lambda c: c.per_sample or c.microbatches > 1 or not c.m_sharpness,
        ),
    ),
    "rho_schedule": (
        OptionUse(
            "without a learning rate that moves, by --schedule or --lr-warmup-epochs",
            lambda c: c.rho_schedule == "constant" or _moves(c),
        ),
    ),
    "rho_min": (
        OptionUse(
            "without --rho-schedule proportional", lambda c: c.rho_schedule == "proportional"
        ),
    ),
    "noise_type": (NOISE,),
    "label_seed": (NOISE,),
    "data_split_seed": (OptionUse("without --train-split or --val-split", _splits),),
    "image_size": (
        OptionUse("without --data folder:PATH", lambda c: c.data.startswith("folder:")),
    ),
    "download": (CIFAR,),
    "data_dir": (CIFAR,),
    "epochs": (
        OptionUse(
            "with --steps, which sets the length of the training",
            lambda c: c.steps is None,
            "Omit one of them.",
        ),
    ),
}
"""Conditions by option. Options of a preset are not checked: others may have replaced them."""


def refuse_ignored(config: TrainConfig, typed: Sequence[str], named: Collection[str] = ()) -> None:
    """Refuse options that were given and have no effect.

    Args:
        config: The settings that the options led to.
        typed: Options on the command line.
        named: Names of settings in the user's own file. A file may list all settings, so a default
            value there is not refused.

    Raises:
        UsageError: An option has no effect.
    """
    names = {name.removeprefix("--").replace("-", "_") for name in typed_names(typed)}
    names |= {f.name for f in fields(config) if getattr(config, f.name) != f.default} & {*named}
    for name, uses in USES.items():
        for use in uses if name in names else ():
            if not use.counts(config):
                raise UsageError(
                    f"{option_name(name)}: it would change nothing {use.reason}. {use.fix}"
                )
