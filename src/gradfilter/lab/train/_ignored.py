"""Options that would change nothing: whoever types one expects that it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._check import option
from gradfilter.lab.train._config import TrainConfig


@dataclass(frozen=True)
class Use:
    """What makes an option count.

    Attributes:
        beside: In the words of the command line; what it is without or beside.
        counts: Whether it does.
        fix: What to do where it does not.
    """

    beside: str
    counts: Callable[[TrainConfig], bool]
    fix: str = "Leave it away, or give that, too."


def _moves(config: TrainConfig) -> bool:
    """Whether the learning rate does."""
    return config.schedule != "constant" or config.lr_warmup_epochs > 0


def _drops(config: TrainConfig) -> bool:
    """Whether a schedule that waits may come to its first drop; steps depend on the data set."""
    waits = {"step": config.lr_step + config.lr_warmup_epochs, "plateau": config.lr_patience + 2}
    return config.steps is not None or waits.get(config.schedule, 0.0) < config.epochs


def _splits(config: TrainConfig) -> bool:
    """Whether samples are divided by chance."""
    return config.data == "digits" or bool(config.train_split) or bool(config.val_split)


ADAM = Use("without --optimizer adam or adamw", lambda c: c.optimizer in ("adam", "adamw"))
RMSPROP = Use("without --optimizer rmsprop", lambda c: c.optimizer == "rmsprop")
AGREE = Use("without --agree", lambda c: c.agree is not None)
AGC = Use("without --agc above 0", lambda c: bool(c.agc))
NOISE = Use("without --label-noise", lambda c: c.label_noise > 0)
CIFAR = Use(
    "without --data cifar10, cifar100 or cifar100n-fine", lambda c: c.data.startswith("cifar")
)
LONG = Use(
    "in a training that ends before the first drop",
    _drops,
    "Give a smaller --lr-step or --lr-patience, or more --epochs.",
)

USES: Mapping[str, tuple[Use, ...]] = {
    "momentum": (
        Use("without --optimizer sgd or rmsprop", lambda c: c.optimizer in ("sgd", "rmsprop")),
    ),
    "betas": (ADAM,),
    "eps": (Use("without --optimizer adam, adamw or rmsprop", lambda c: c.optimizer != "sgd"),),
    "alpha": (RMSPROP,),
    "centered": (RMSPROP,),
    "schedule": (LONG,),
    "lr_step": (Use("without --schedule step", lambda c: c.schedule == "step"), LONG),
    "lr_decay_rate": (
        Use("without --schedule step or plateau", lambda c: c.schedule in ("step", "plateau")),
        LONG,
    ),
    "lr_min": (
        Use("without --schedule other than constant", lambda c: c.schedule != "constant"),
        LONG,
    ),
    "lr_power": (Use("without --schedule poly", lambda c: c.schedule == "poly"),),
    "lr_patience": (Use("without --schedule plateau", lambda c: c.schedule == "plateau"), LONG),
    "lr_warmup_initial": (Use("without --lr-warmup-epochs", lambda c: c.lr_warmup_epochs > 0),),
    "budget_power": (Use("without --budget-clip", lambda c: c.budget_clip is not None),),
    "against": (AGREE,),
    "average": (AGREE,),
    "agc_eps": (AGC,),
    "agc_exclude": (AGC,),
    "m_sharpness": (
        Use(
            "without several rows, of --microbatches or --per-sample",
            lambda c: c.per_sample or c.microbatches > 1 or not c.m_sharpness,
        ),
    ),
    "rho_schedule": (
        Use(
            "without a learning rate that moves, by --schedule or --lr-warmup-epochs",
            lambda c: c.rho_schedule == "constant" or _moves(c),
        ),
    ),
    "rho_min": (
        Use("without --rho-schedule proportional", lambda c: c.rho_schedule == "proportional"),
    ),
    "noise_type": (NOISE,),
    "label_seed": (NOISE,),
    "data_split_seed": (Use("without --train-split or --val-split", _splits),),
    "image_size": (Use("without --data folder:PATH", lambda c: c.data.startswith("folder:")),),
    "download": (CIFAR,),
    "data_dir": (CIFAR,),
    "epochs": (
        Use(
            "beside --steps, which says how long the training is",
            lambda c: c.steps is None,
            "Leave one of them away.",
        ),
    ),
}
"""What options are for; those of a preset may be left over from what was replaced."""


def refuse_ignored(config: TrainConfig, typed: Sequence[str], named: Collection[str] = ()) -> None:
    """Refuse options that were given and do nothing.

    Args:
        config: What came of them.
        typed: On the command line.
        named: Settings in a file of the user's own. A file may list all of them, so what is the
            default there asks for nothing.

    Raises:
        UsageError: One is not used.
    """
    options = (text.partition("=")[0] for text in typed if text.startswith("--"))
    names = {text.removeprefix("--").replace("-", "_") for text in options}
    names |= {f.name for f in fields(config) if getattr(config, f.name) != f.default} & {*named}
    for name, uses in USES.items():
        for use in uses if name in names else ():
            if not use.counts(config):
                raise UsageError(f"{option(name)}: it would change nothing {use.beside}. {use.fix}")
