"""Refuse training options that are wrong, that contradict each other, or that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from gradfilter.lab._constraints import check_fields
from gradfilter.lab._usage import UsageError, option_name, refuse_odd, typed_names
from gradfilter.lab.train._torch_optimizers import RATE_READ_ONCE, TORCH, check_optimizer, takes
from gradfilter.lab.train._train_config import TrainConfig

# --- Options that are wrong or contradict each other ---


def check_values(config: TrainConfig) -> None:
    """Refuse values that are wrong for every data set and model.

    Raises:
        UsageError: A value is out of range, or two values exclude each other.
    """
    check_fields(config)
    refuse_odd(config)
    check_optimizer(config)
    _check_together(config)


def _check_together(config: TrainConfig) -> None:
    rows = f"--microbatches {config.microbatches}"
    several = config.per_sample or config.microbatches > 1
    reducers = [option_name(name) for name in REDUCERS if getattr(config, name) not in OFF]
    refusals = [
        (
            len(reducers) > 1,
            f"{' and '.join(reducers)}: each makes one gradient of all rows. Choose one.",
        ),
        (
            bool(reducers) and not several,
            f"{', '.join(reducers)}: expected several rows to compare, found {rows}. "
            "Give --microbatches 8, or --per-sample.",
        ),
        (
            config.sam is not None and _without_weights(config) and not config.m_sharpness,
            f"--sam: it combines rows by their weights, and with {_without_weights(config)} a row "
            "has no single weight. Also give --m-sharpness, which perturbs every row before.",
        ),
        (
            config.gsam is not None and bool(_without_weights(config)),
            f"--gsam: it combines rows by their weights, and with {_without_weights(config)} a row "
            "has no single weight. Choose one.",
        ),
        (
            config.budget_clip is not None and not several,
            f"--budget-clip: expected several rows to share it, found {rows}. "
            "Give --microbatches 8, or --per-sample.",
        ),
        (
            len(_clips(config)) > 1,
            f"{', '.join(_clips(config))}: each limits the norms of rows. Choose one.",
        ),
        (
            config.clip_per_leaf
            and config.clip_per_row is None
            and config.clip_quantile is None
            and not config.clip_smallest,
            "--clip-per-leaf: there is no clip of rows. Also give --clip-per-row 1.",
        ),
        (
            (config.clip_smallest or config.outlier_filter is not None or bool(config.trim_losses))
            and not several,
            f"--clip-smallest, --outlier-filter, --trim-losses: expected several rows, found "
            f"{rows}. Give --microbatches 8, or --per-sample.",
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
            config.sam is None and (config.friendly_sam is not None or config.look_sam is not None),
            "--friendly-sam, --look-sam: they change --sam, which is not given. Give --sam 0.05.",
        ),
        (
            config.friendly_sam is not None and config.look_sam is not None,
            "--friendly-sam, --look-sam: both replace the rule of --sam. Choose one.",
        ),
        (
            config.m_sharpness and (config.friendly_sam is not None or config.look_sam is not None),
            "--m-sharpness: it perturbs rows, --friendly-sam and --look-sam one gradient. Choose "
            "one.",
        ),
        (
            config.look_sam is not None and config.gsam is not None,
            "--look-sam, --gsam: both replace the gradient that --sam takes. Choose one.",
        ),
        (
            config.spike_clip is not None and config.adagc is not None,
            "--spike-clip, --adagc: both shorten a gradient that is longer than earlier ones. "
            "Choose one.",
        ),
        (
            config.sam is not None and config.rho_min > config.sam,
            f"--rho-min: expected at most --sam {config.sam}, found {config.rho_min}.",
        ),
        (
            config.nesterov
            and not takes(config, "nesterov")
            and (config.optimizer != "sgd" or config.momentum == 0),
            "--nesterov: expected --optimizer sgd with momentum above 0. Omit it, or change those.",
        ),
        (  # also that of a preset or a file: a run would record a decay that it did not have
            config.weight_decay > 0 and bool(_torch(config)) and not takes(config, "weight_decay"),
            f"--weight-decay {config.weight_decay}: {config.optimizer} has no weight decay. Give "
            "--weight-decay 0, or another --optimizer.",
        ),
        *_wrapper_refusals(config),
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


def _clips(config: TrainConfig) -> list[str]:
    """Return the options that limit the norms of rows, as far as they are given."""
    given = {
        "--budget-clip": config.budget_clip is not None,
        "--clip-per-row": config.clip_per_row is not None,
        "--clip-quantile": config.clip_quantile is not None,
        "--clip-smallest": config.clip_smallest,
        "--normalize-rows": config.normalize_rows is not None,
    }
    return [name for name, is_given in given.items() if is_given]


def _wrapper_refusals(config: TrainConfig) -> list[tuple[bool, str]]:
    """Return conditions and errors of --cautious, --schedule-free and --msam."""
    ahead = config.schedule_free or config.msam is not None
    parts = {
        "--cautious": config.cautious,
        "--msam": config.msam is not None,
        "--no-decay": bool(config.no_decay),
    }
    needed = ", ".join(option for option, given in parts.items() if given)
    return [
        (
            config.schedule_free and config.optimizer not in ("sgd", "adam", "adamw"),
            "--schedule-free: expected --optimizer sgd, adam or adamw, found "
            f"{config.optimizer}. Choose one of them.",
        ),
        (
            bool(needed) and config.optimizer.startswith(TORCH),
            f"{needed}: expected an update rule of gradfilter, whose parts are known, found "
            f"{config.optimizer}. Choose another --optimizer.",
        ),
        (
            config.schedule_free and (config.nesterov or config.cautious),
            "--schedule-free: it has an average in place of momentum, which --nesterov and "
            "--cautious need. Choose one.",
        ),
        (
            config.schedule_free and config.msam is not None,
            "--schedule-free, --msam: the average takes the place of the momentum that --msam "
            "follows. Choose one.",
        ),
        (
            bool(config.no_decay) and config.optimizer == "muon",
            "--no-decay: expected one rule for all parameters, found --optimizer muon with adamw. "
            "Choose another.",
        ),
        (
            bool(config.no_decay) and config.optimizer == "per_example_adam",
            "--no-decay: expected a rule that takes a mask of what decays, found --optimizer "
            "per_example_adam. Choose another.",
        ),
        (
            config.msam is not None and config.sam is not None,
            "--msam, --sam: both perturb the parameters. Choose one.",
        ),
        (
            config.msam is not None and config.optimizer == "muon",
            "--msam: expected one rule for all parameters, found --optimizer muon with adamw. "
            "Choose another.",
        ),
        (
            (config.msam is not None or config.cautious) and not _has_momentum(config),
            "--msam, --cautious: expected an update rule with momentum, found "
            f"{config.optimizer} without. Give --momentum 0.9, or the first of --betas above 0.",
        ),
        (
            ahead and config.ema is not None,
            "--ema: it averages the parameters of the training, which --schedule-free and --msam "
            "do not evaluate. Choose one.",
        ),
    ]


def _has_momentum(config: TrainConfig) -> bool:
    if config.optimizer in ("adam", "adamw", "lion"):
        return config.betas[0] > 0
    if config.optimizer == "rmsprop":
        return bool(config.momentum)
    return config.optimizer == "muon" or config.momentum != 0


REDUCERS = (
    *("agree", "consensus", "reference", "trimmed_mean", "coordinate_median", "geometric_median"),
    "centered_clip",
)
"""Options that make one gradient of all rows."""
OFF = (None, False)


def _without_weights(config: TrainConfig) -> str:
    """Return the option by which rows have no single weight; empty if there is none."""
    names = ("trimmed_mean", "coordinate_median", "centered_clip", "agree_per", "agree_exclude")
    return next((option_name(n) for n in names if getattr(config, n) not in (*OFF, ())), "")


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


def _torch(config: TrainConfig) -> tuple[str, ...]:
    """Return the name of the optimizer if it is a class of torch, whose arguments are its own."""
    return (config.optimizer,) if config.optimizer.startswith(TORCH) else ()


def _taken(option: str) -> OptionUse:
    """Return the condition that a class of torch has an option as an argument."""
    return OptionUse(
        "with a class of torch that has no such argument, or another default for it",
        lambda c: not _torch(c) or takes(c, option),
        "Omit it; --optimizer-arguments sets what the class has.",
    )


BETAS = OptionUse(
    "without --optimizer adam, adamw, per_example_adam, lion or muon",
    lambda c: c.optimizer in ("adam", "adamw", "per_example_adam", "lion", "muon", *_torch(c)),
)
RMSPROP = OptionUse("without --optimizer rmsprop", lambda c: c.optimizer in ("rmsprop", *_torch(c)))
AGREE = OptionUse("without --agree", lambda c: c.agree is not None)
AGC = OptionUse("without --agc above 0", lambda c: bool(c.agc))
CLEAN = OptionUse("without --reference clean", lambda c: c.reference == "clean")
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
    "optimizer_arguments": (
        OptionUse("without --optimizer torch:NAME", lambda c: bool(_torch(c))),
    ),
    "momentum": (
        _taken("momentum"),
        OptionUse(
            "without --optimizer sgd, rmsprop or muon",
            lambda c: c.optimizer in ("sgd", "rmsprop", "muon", *_torch(c)),
        ),
    ),
    "betas": (_taken("betas"), BETAS),
    "eps": (
        _taken("eps"),
        OptionUse(
            "with --optimizer sgd or lion",
            lambda c: c.optimizer not in ("sgd", "lion"),
        ),
    ),
    "alpha": (_taken("alpha"), RMSPROP),
    "no_decay": (OptionUse("without --weight-decay above 0", lambda c: c.weight_decay > 0),),
    "centered": (_taken("centered"), RMSPROP),
    "schedule": (
        LONG,
        OptionUse(
            "with --optimizer torch:Rprop, which reads the learning rate in its first step alone",
            lambda c: c.schedule == "constant" or c.optimizer != RATE_READ_ONCE,
            "Omit it, or choose another --optimizer.",
        ),
    ),
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
    "agree_per": (AGREE,),
    "agree_exclude": (AGREE,),
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
    "label_seed": (
        OptionUse(
            "without --label-noise or --reference clean",
            lambda c: c.label_noise > 0 or c.reference == "clean",
        ),
    ),
    "reference_samples": (CLEAN,),
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
    check_optimizer(config)
    names = {name.removeprefix("--").replace("-", "_") for name in typed_names(typed)}
    names |= {f.name for f in fields(config) if getattr(config, f.name) != f.default} & {*named}
    for name, uses in USES.items():
        for use in uses if name in names else ():
            if not use.counts(config):
                raise UsageError(
                    f"{option_name(name)}: it would change nothing {use.reason}. {use.fix}"
                )
