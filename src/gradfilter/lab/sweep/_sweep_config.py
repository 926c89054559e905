"""Define the options of ``gradfilter sweep``, and parse those before a lone ``--``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from gradfilter.lab._constraints import at_least
from gradfilter.lab._options import (
    arguments,
    parse,
    read_settings,
    value_of,
)
from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._bracketed_values import quoted_value

TRIALS = 20


@dataclass(frozen=True)
class SweepConfig:
    """Train many times, as one study that any number of workers and machines share.

    Options of train that all trainings have in common come after a lone --:
    gradfilter sweep --grid learning_rate=0.01,0.1 seed=0,1,2 -- --epochs 20 --label-noise 0.3

    The same command in another terminal or on another machine joins the study and shares the
    work. After Ctrl-C or kill -9 it continues the study, and every training from its last point.
    At the end study.csv and study.json have a line per training. The exit code is 1 if a training
    failed.
    """

    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,...: train every combination of these values of settings of train. Quote a
    value that has several parts: "betas=0.9 0.99,0.5 0.9". A value with commas is in brackets:
    "optimizer_arguments=[etas=0.4,1.1],[etas=0.5,1.2]"."""
    sample: tuple[str, ...] = ()
    """NAME=LOW:HIGH, NAME=log:LOW:HIGH or NAME=VALUE,VALUE,...: search settings of train by
    tree-structured Parzen estimators (TPE)."""
    trials: Annotated[int | None, at_least(1, f"{TRIALS} is the default.")] = None
    """Number of trainings for --sample, by default 20; a larger number extends a study."""
    sampler_seed: Annotated[int | None, at_least(0)] = None
    """Seed of the search, by default 0."""

    metric: str | None = None
    """Number of an evaluation to compare: by default val_accuracy with a validation split, else,
    for a grid, test_accuracy."""
    evaluation: Literal["last", "best"] = "last"
    """Evaluation of a training to compare."""
    direction: Literal["maximize", "minimize"] | None = None
    """Whether larger or smaller values are better; by default it follows from --metric."""

    name: str = ""
    """Name of the study, and of the folder of its runs inside train's --save-dir; by default sweep
    (NAME)."""
    storage: str | None = None
    """Storage of the study: a file, by default study.db in that folder, or for several machines the
    URL of a database: postgresql://USER@HOST/NAME, mysql://..."""
    jobs: Annotated[int, at_least(1, "Each is a process of its own.")] = 1
    """Number of workers to start; each has its own GPU if there are several."""
    heartbeat: Annotated[int, at_least(1, unit=" second")] = 30
    """Seconds between two heartbeats of a worker. After twice as many without one, another worker
    takes over the training. A study keeps the value that it was started with."""
    retry_failed: bool = False
    """Repeat failed trainings."""

    preset: str | None = None
    """Tables [sweep] and [train] of a published recipe: gaf-cifar100, gaf-cifar100n,
    agc-cifar10, gsam-cifar10, double-descent-cifar10 or double-descent-digits."""
    config: Path | None = None
    """TOML file with such tables. It overrides a preset; options override both."""


PROGRAM = "gradfilter sweep"


def parse_own(options: Sequence[str]) -> SweepConfig:
    """Parse the options of sweep itself; those of train come after a lone ``--``.

    Raises:
        UsageError: An option, a file or a preset is wrong.
    """
    own, _ = split(options)
    preset, file = value_of("--preset", own), value_of("--config", own)
    given = read_settings(preset, None if file is None else Path(file), "sweep")
    typed: list[str] = []
    for key in ("grid", "sample"):
        if key in given:
            typed += [f"--{key}", *as_typed(given.pop(key), key)]
    try:
        config = parse(SweepConfig, PROGRAM, [*arguments(given), *typed, *gathered(own)])
    except UsageError as error:
        raise UsageError(f"{error} Options of train come after a lone --.") from None
    return config


def split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split options of sweep from those of train, after a lone ``--``.

    Examples:
        >>> split(["--jobs", "2", "--", "--epochs", "5"])
        (['--jobs', '2'], ['--epochs', '5'])
    """
    end = list(options).index("--") if "--" in options else len(options)
    return list(options[:end]), list(options[end + 1 :])


def gathered(options: Sequence[str]) -> list[str]:
    """Collect all values of --grid in one place, and those of --sample.

    Examples:
        >>> gathered(["--grid", "seed=0,1", "--jobs", "2", "--grid=agree=0.9,1"])
        ['--jobs', '2', '--grid', 'seed=0,1', 'agree=0.9,1']
    """
    values: dict[str, list[str]] = {}
    others: list[str] = []
    into = others
    for text in options:
        option, equals, value = text.partition("=")
        if option in ("--grid", "--sample"):
            into = values.setdefault(option, [])
            into += [value] if equals else []
        elif text.startswith("--"):
            into = others
            others.append(text)
        else:
            into.append(text)
    return others + [text for option, given in values.items() for text in (option, *given)]


def as_typed(table: Any, key: str) -> list[str]:
    """Convert a table or list of a configuration file to options.

    Examples:
        >>> as_typed({"seed": [0, 1], "betas": [[0.9, 0.99], [0.5, 0.9]]}, "grid")
        ['seed=0,1', 'betas=0.9 0.99,0.5 0.9']
        >>> as_typed({"optimizer_arguments": [["etas=0.4,1.1"], ["etas=0.5,1.2"]]}, "grid")
        ['optimizer_arguments=[etas=0.4,1.1],[etas=0.5,1.2]']
    """
    if isinstance(table, list) and all(isinstance(line, str) for line in table):
        return table
    if not isinstance(table, Mapping):
        raise UsageError(f"--config: expected [sweep.{key}] to be a table, found {table!r}.")
    return [f"{name}={_as_values(value)}" for name, value in table.items()]


def _as_values(value: Any) -> str:
    if not isinstance(value, list):
        return _as_text(value)
    return ",".join(quoted_value(_as_text(item)) for item in value)


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
