"""Options that would change nothing: whoever types one expects that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._config import TrainConfig

Condition = tuple[str, Callable[[TrainConfig], bool]]
ADAM: Condition = ("--optimizer adam or adamw", lambda c: c.optimizer in ("adam", "adamw"))
RMSPROP: Condition = ("--optimizer rmsprop", lambda c: c.optimizer == "rmsprop")
AGREE: Condition = ("--agree", lambda c: c.agree is not None)
AGC: Condition = ("--agc", lambda c: c.agc is not None)

NEEDS: Mapping[str, Condition] = {
    "momentum": ("--optimizer sgd or rmsprop", lambda c: c.optimizer in ("sgd", "rmsprop")),
    "betas": ADAM,
    "eps": ("--optimizer adam, adamw or rmsprop", lambda c: c.optimizer != "sgd"),
    "alpha": RMSPROP,
    "centered": RMSPROP,
    "lr_step": ("--schedule step", lambda c: c.schedule == "step"),
    "lr_decay_rate": ("--schedule step or plateau", lambda c: c.schedule in ("step", "plateau")),
    "lr_min": ("--schedule other than constant", lambda c: c.schedule != "constant"),
    "lr_power": ("--schedule poly", lambda c: c.schedule == "poly"),
    "lr_patience": ("--schedule plateau", lambda c: c.schedule == "plateau"),
    "lr_warmup_initial": ("--lr-warmup-epochs", lambda c: c.lr_warmup_epochs > 0),
    "budget_power": ("--budget-clip", lambda c: c.budget_clip is not None),
    "against": AGREE,
    "average": AGREE,
    "agc_eps": AGC,
    "agc_exclude": AGC,
    "noise_type": ("--label-noise", lambda c: c.label_noise > 0),
    "image_size": ("--data folder:PATH", lambda c: c.data.startswith("folder:")),
    "download": ("--data cifar10 or cifar100", lambda c: c.data.startswith("cifar")),
    "epochs": ("no --steps", lambda c: c.steps is None),
}
"""What an option is for; those of a preset may be left over from what was replaced."""


def refuse_ignored(config: TrainConfig, typed: Sequence[str]) -> None:
    """Refuse options that were typed and do nothing.

    Args:
        config: What came of them.
        typed: On the command line.

    Raises:
        UsageError: One is not used.
    """
    names = {option.split("=")[0].removeprefix("--").replace("-", "_") for option in typed}
    for name, (needed, is_used) in NEEDS.items():
        if name in names and not is_used(config):
            raise UsageError(
                f"--{name.replace('_', '-')}: it would change nothing without {needed}. "
                "Leave it away, or give that, too."
            )
