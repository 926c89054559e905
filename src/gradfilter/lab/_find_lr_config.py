"""Define, read and check the options of ``gradfilter find-lr``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gradfilter.lab._options import (
    environment_arguments,
    from_files,
    parse,
    read_settings,
)
from gradfilter.lab._usage import UsageError, check, option_name, typed_names
from gradfilter.lab.train._config_checks import refuse_ignored
from gradfilter.lab.train._torch_optimizers import RATE_READ_ONCE
from gradfilter.lab.train._train_command import expanded_options
from gradfilter.lab.train._train_config import GROUPS, TrainConfig

PROGRAM = "gradfilter find-lr"
FEWEST, MOST = 20, 1_000_000
"""Smallest number of rates from which a curve can be read, and largest one, a step each."""
NARROWEST = 1.1
"""Smallest ratio of --high to --low."""
UNUSED = (
    *("learning_rate", "schedule", "lr_step", "lr_decay_rate", "lr_min", "lr_power"),
    *("lr_patience", "lr_warmup_epochs", "lr_warmup_initial", "rho_schedule", "rho_min"),
    *("epochs", "steps", "early_exit_accuracy", "early_exit_loss", "ema", "eval_every"),
    *("save_checkpoint", "resume_every", "resume", "name", "save_dir", "tensorboard", "wandb"),
    "log_level",
)
"""Options of train that have no effect here: the rates rise, and no run is written."""


@dataclass(frozen=True)
class FindLrCommand:
    """Find a learning rate for a rule: train with rising rates, and watch the loss.

    The rate rises exponentially from --low to --high, one step per rate, with the data, the model,
    the filters and the update rule that the options of train describe. The test stops when the loss
    diverges. It suggests a tenth of the rate with the lowest smoothed loss. It touches no run, and
    writes nothing without --out.
    """

    settings: tyro.conf.OmitArgPrefixes[TrainConfig]
    low: float = 1e-5
    """Smallest learning rate."""
    high: float = 10.0
    """Largest learning rate."""
    rates: int = 200
    """Number of learning rates, one step each."""
    out: Path | None = None
    """New or empty directory for find-lr.json and find-lr.png."""
    preset: str | None = None
    """Recipe of gradfilter train."""
    config: Path | None = None
    """TOML file with a table [train]. It overrides a preset; options override both."""


HEADINGS: Mapping[str, Sequence[str]] = {
    **{title: [n for n in names if n not in UNUSED] for title, names in GROUPS.items()},
    "options of train that are refused here": UNUSED,
}


def parse_find_lr(options: Sequence[str]) -> FindLrCommand:
    """Read the options; those of train also come from a preset, a file and the environment.

    Raises:
        UsageError: An option is wrong, or it would have no effect.
    """
    files = from_files(options, "train", TrainConfig)
    given = [*files, *environment_arguments(TrainConfig), *options]
    command = parse(FindLrCommand, PROGRAM, expanded_options(given), HEADINGS)
    typed = {name.replace("--no-", "--") for name in typed_names(options)}
    for name in UNUSED:
        if option_name(name) in typed:
            raise UsageError(
                f"{option_name(name)}: it would change nothing, because find-lr sets the rates "
                "itself and writes no run. Omit it."
            )
    own = {} if command.config is None else read_settings(None, command.config, "train")
    refuse_ignored(command.settings, options, own.keys() - {*UNUSED})
    check(
        command.settings.optimizer != RATE_READ_ONCE,
        "--optimizer",
        "an update rule that reads the learning rate in every step",
        RATE_READ_ONCE,
        "It needs no search: its steps have sizes of their own after the first.",
    )
    check_rates(command.low, command.high, command.rates)
    return command


def check_rates(low: float, high: float, rates: int) -> None:
    """Refuse a range from which no rate can be read.

    Raises:
        UsageError: A bound is not positive or not finite, the range is empty, or it has too few
            rates.
    """
    fix = "1e-5 is the default."
    check(0 < low < math.inf, "--low", "a positive number", low, fix)
    check(low < high < math.inf, "--high", f"a number above --low {low:g}", high, "10 is usual.")
    wide = math.log(high) - math.log(low) >= math.log(NARROWEST)
    check(wide, "--high", f"at least {NARROWEST} times --low {low:g}", high, "10 is usual.")
    check(rates >= FEWEST, "--rates", f"at least {FEWEST}", rates, "200 is the default.")
    check(rates <= MOST, "--rates", f"at most {MOST}", rates, "200 is the default.")
