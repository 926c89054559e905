"""The options of ``gradfilter stats``, the catalogue of metrics, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.stats._surroundings import StrategyName, is_path

# --- The catalogue: metrics, their options, and the names of their numbers ---


MetricName = Literal[
    "crossentropy",
    "accuracy",
    "confidence",
    "jacobian",
    "jacobian_operator_norm",
    "tangent_jacobian",
    "tangent_hessian",
    "loss_gradient",
    "loss_hessian_trace",
    "loss_hessian_top",
    "agreement",
    "sharpness",
]


@dataclass(frozen=True)
class Metric:
    """One of them.

    Attributes:
        takes: The settings that change its numbers, beside those that every metric has.
        columns: What its numbers are, where there are several.
        per_batch: It has one row per batch, not one number per sample.
        draws: It has random numbers, of its own for every sample (or batch).
        chunked: It is computed class by class, in chunks unless there is memory enough.
        lipschitz: √(mean m²) is the empirical Lipschitz constant.
    """

    takes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    per_batch: bool = False
    draws: bool = False
    chunked: bool = False
    lipschitz: bool = False


_OUTPUT = ("normalization", "target_logit_only")

METRICS: dict[MetricName, Metric] = {
    "crossentropy": Metric(),
    "accuracy": Metric(),
    "confidence": Metric(),
    "jacobian": Metric(_OUTPUT, chunked=True),
    "jacobian_operator_norm": Metric(
        (*_OUTPUT, "method", "num_power_iters"), draws=True, chunked=True, lipschitz=True
    ),
    "tangent_jacobian": Metric((*_OUTPUT, "legacy_scale"), draws=True),
    "tangent_hessian": Metric((*_OUTPUT, "legacy_scale"), draws=True, chunked=True),
    "loss_gradient": Metric(),
    "loss_hessian_trace": Metric(("num_probes",), draws=True),
    "loss_hessian_top": Metric(("num_power_iters",), draws=True),
    "agreement": Metric(
        ("batch_size", "microbatches"),
        ("mean_pairwise_cosine", "simple_noise_scale", "noise_trace", "gradient_sq_norm"),
        per_batch=True,
    ),
    "sharpness": Metric(
        ("batch_size", "rho", "num_power_iters", "num_probes"),
        ("sharpness", "hessian_top", "hessian_trace"),
        per_batch=True,
        draws=True,
    ),
}


# --- The options ---


@dataclass(frozen=True)
class StatsConfig:
    """Measure the checkpoints of a run, sample by sample, in evaluation mode.

    Without --checkpoint, --last or a step it lists what can be measured. The numbers are written
    into the run's folder stats/, as METRIC-SPLIT[-SETTINGS]-checkpoint-ID.json. A measurement can
    be stopped at any moment, by Ctrl-C or kill -9; the same command continues it. In several
    processes (torchrun --nproc-per-node 2 -m gradfilter stats ...) each measures its part.
    """

    # Not an option: torchrun would take --run for one of its own.
    run: tyro.conf.Positional[Path | None] = None
    """The run's directory; otherwise it is looked for by --data, --model, --label-noise, --seed
    and --name in --save-dir."""
    data: str | None = None
    """Of the run that is looked for."""
    model: str | None = None
    """Of the run that is looked for."""
    label_noise: float | None = None
    """Of the run that is looked for."""
    seed: int | None = None
    """Of the run that is looked for."""
    name: str | None = None
    """Of the run that is looked for (NAME)."""
    save_dir: Path = Path("runs")
    """Where runs are kept (SAVE_DIR)."""
    data_dir: Path | None = None
    """Where torchvision keeps its data sets (DATA_DIR), if it is no longer where the run had it."""

    preset: str | None = None
    """What a published recipe measures: double-descent-cifar10, double-descent-digits. Options
    given beside it count more."""
    config: Path | None = None
    """A TOML file with a table [stats]; counts more than a preset, less than options."""

    metric: MetricName = "crossentropy"
    """What to measure."""
    checkpoint: tuple[int, ...] = ()
    """Which checkpoints: 0 is the start of the training, 1 the next that was saved, ..."""
    last: bool = False
    """The last checkpoint."""
    checkpoint_by_step: bool = False
    """The numbers of --checkpoint are training steps, not ids."""
    nsteps_per_epoch: int | None = None
    """The numbers of --checkpoint are epochs of so many steps; needs --checkpoint-by-step."""

    dataset_split: Literal["train", "val", "test"] = "train"
    """On which samples."""
    num_samples: int | None = None
    """How many of them, in the order of the split; None takes all from --skip on. Parts whose
    sizes are multiples of --batch-size are joined once they cover the split."""
    skip: int = 0
    """How many of the first are left out."""
    batch_size: int = 64
    """Samples measured at once."""
    restored_targets: bool = False
    """The true labels in place of the wrong ones that the run was trained on."""

    gen_strategy: StrategyName = "none"
    """Around every image: moved by pixels, without singular values, or along paths of those."""
    num_directions: int = 8
    """Directions in which an image is left."""
    cumulative: bool = False
    """The running mean at every anchor of a path instead of the whole path's."""
    raw_path: bool = False
    """Every value along the paths, and the distances between them, instead of means."""

    normalization: Literal["none", "softmax", "logsoftmax", "crossentropy", "jacobian"] = "none"
    """What is differentiated: logits, probabilities, their logarithms, the loss, or the logits
    with a Jacobian divided by its own Frobenius norm."""
    target_logit_only: bool = False
    """Only the output of the target class."""
    method: Literal["auto", "gram", "power"] = "auto"
    """How an operator norm is found: from J J^T, by power iteration, or whichever is quicker."""
    num_power_iters: int = 50
    """Largest number of iterations, for operator norms and top eigenvalues."""
    num_probes: int = 32
    """Random vectors for a Hessian's trace."""
    legacy_scale: bool = False
    """Tangent metrics divide by 0.1 instead of the distance to the jittered image."""
    mc_sample_seed: int = 0
    """Seed of jittered images, starting vectors and probes."""
    microbatches: int = 8
    """Rows per batch, for agreement."""
    rho: float = 0.05
    """Radius of the perturbation, for sharpness."""

    bigmem: bool = False
    """All classes at once instead of in chunks."""
    outname: str = ""
    """Put before the name of the file."""
    device: str = "cpu"
    """Where to measure: cpu, cuda, cuda:1, mps, ... (DEVICE); each of several processes on its
    own."""


# --- Options that are refused before anything is computed ---


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
