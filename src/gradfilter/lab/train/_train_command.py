"""Parse the options of ``gradfilter train``, wherever they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import tyro

from gradfilter.lab._options import (
    as_toml,
    environment_arguments,
    from_files,
    parse,
    read_settings,
)
from gradfilter.lab.train._config_checks import refuse_ignored
from gradfilter.lab.train._run_place import plain_settings
from gradfilter.lab.train._train_config import GROUPS, TrainConfig

PROGRAM = "gradfilter train"


@dataclass(frozen=True)
class TrainCommand:
    """Train one model on one data set, following the gradients you choose.

    Every epoch is counted by samples: --epochs 10 sees ten times as many samples as there are,
    however they are cut into microbatches. A run can be stopped at any moment, by Ctrl-C or
    kill -9, and --resume continues it as if nothing had happened.
    """

    settings: tyro.conf.OmitArgPrefixes[TrainConfig]
    preset: str | None = None
    """A published recipe: gaf-cifar100, gaf-cifar100n, agc-cifar10, gsam-cifar10,
    double-descent-cifar10, double-descent-digits; or a training of the demo: demo-sgd, demo-agree,
    demo-consensus. Other options override it."""
    config: Path | None = None
    """TOML file with a table [train]. It overrides a preset; options override both."""
    print_config: bool = False
    """Print all settings as such a file, and exit."""


def train_command(options: Sequence[str]) -> int:
    """Run ``gradfilter train``.

    Returns:
        The exit code.

    Raises:
        UsageError: An option is wrong.
    """
    command = parse_train(options)
    if command.print_config:
        print(as_toml(plain_settings(command.settings), "train"), end="")
        return 0
    own = {} if command.config is None else read_settings(None, command.config, "train")
    refuse_ignored(command.settings, options, own)
    # Imported after parsing: --help and a misspelt option need no training.
    from gradfilter.lab.train._train import train

    return train(command.settings)


def parse_train(options: Sequence[str], program: str = PROGRAM) -> TrainCommand:
    """Merge settings; later ones win: preset, file, environment, options.

    Raises:
        UsageError: An option, a file or a preset is wrong.
    """
    files = from_files(options, "train", TrainConfig)
    given = [*files, *environment_arguments(TrainConfig), *options]
    return parse(TrainCommand, program, expanded_options(given), GROUPS)


ALONE = {
    **{"--consensus": "1.0", "--budget-clip": "0.3", "--adaptive": "asam", "--average": "mean"},
    **{"--clip-quantile": "0.5", "--normalize-rows": "0.01", "--outlier-filter": "3.0"},
    **{"--reference": "clean", "--spike-clip": "2.5", "--spike-skip": "6.0", "--watch": "1"},
    "--adagc": "1.05",
}
"""The value of an option that is given without one."""
NESTEROV = "sgd+nesterov"


def expanded_options(options: Sequence[str]) -> list[str]:
    """Add omitted values of options, and translate sgd+nesterov.

    Examples:
        >>> expanded_options(["--consensus", "--per-sample", "--optimizer", "sgd+nesterov"])
        ['--consensus', '1.0', '--per-sample', '--optimizer', 'sgd', '--nesterov']
    """
    typed: list[str] = []
    for option, following in zip_longest(options, options[1:], fillvalue="--"):
        if option in (NESTEROV, f"--optimizer={NESTEROV}"):
            typed += [option.replace(NESTEROV, "sgd"), "--nesterov"]
        else:
            typed.append(option)
        if option in ALONE and following.startswith("--"):
            typed.append(ALONE[option])
    return typed
