"""What ``gradfilter sweep`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SweepConfig:
    """Train many times, as one study that any number of workers and machines share.

    Options of train that all trainings have in common come after a lone --:
    gradfilter sweep --grid learning_rate=0.01,0.1 seed=0,1,2 -- --epochs 20 --label-noise 0.3

    The same command given again, in another terminal or on another machine, joins the study and
    shares the work; after Ctrl-C or kill -9 it goes on with it, and a training goes on where it
    was stopped. Afterwards study.csv and study.json have a line per training. The exit code is 1
    if a training failed.
    """

    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,...: settings of train and their values; every combination is trained.
    Several parts of one value are quoted: "betas=0.9 0.99,0.5 0.9"."""
    sample: tuple[str, ...] = ()
    """NAME=LOW:HIGH, NAME=log:LOW:HIGH or NAME=VALUE,VALUE,...: settings of train that are searched
    by tree-structured Parzen estimators (TPE)."""
    trials: int | None = None
    """Trainings of --sample, 20 unless given; more may be asked for later."""
    sampler_seed: int | None = None
    """Seed of the search, 0 unless given."""

    metric: str | None = None
    """Which number of an evaluation counts: val_accuracy if there is a validation split, else, for
    a grid, test_accuracy."""
    evaluation: Literal["last", "best"] = "last"
    """Of which evaluation of a training."""
    direction: Literal["maximize", "minimize"] | None = None
    """Which values are better; None knows it from the metric."""

    name: str = ""
    """Of the study, and of the folder inside train's --save-dir that its runs are kept in; sweep
    unless given (NAME)."""
    storage: str | None = None
    """Where the study is kept: a file, by default study.db in that folder, or for several machines
    the URL of a database: postgresql://USER@HOST/NAME, mysql://..."""
    jobs: int = 1
    """Workers that this command starts, on a GPU each if there are several."""
    heartbeat: int = 30
    """Seconds between two signs of life of a worker; after twice as many without one its training
    is taken up by another. What the study was begun with counts for all who join it."""
    retry_failed: bool = False
    """Train again what failed."""

    preset: str | None = None
    """The tables [sweep] and [train] of a published recipe: gaf-cifar100, gaf-cifar100n,
    agc-cifar10, gsam-cifar10, double-descent-cifar10 or double-descent-digits."""
    config: Path | None = None
    """A TOML file with such tables; counts more than a preset, less than options."""
