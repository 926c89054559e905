"""Define the options of ``gradfilter stats``, the catalogue of metrics, and checks of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gradfilter.lab._constraints import USUAL, Constraint, at_least, check_fields, positive
from gradfilter.lab._usage import UsageError, check, option_name, typed_names

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
    """A metric.

    Attributes:
        takes: Settings that change its numbers, in addition to those of every metric.
        columns: Names of its numbers, if there are several.
        per_batch: Whether it has one row per batch instead of one number per sample.
        draws: Whether it draws random numbers, separately for every sample (or batch).
        chunked: Whether it is computed class by class, in chunks unless --bigmem is given.
        lipschitz: Whether √(mean m²) is the empirical Lipschitz constant.
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


# --- Points around images, by name ---


StrategyName = Literal[
    "none",
    "1px-shifts",
    "4px-shifts",
    "shifts-path",
    "svd-5",
    "svd-10",
    "svd-15",
    "svd-20",
    "svd-22",
    "svd-25",
    "svd-path",
]


def is_path(name: StrategyName) -> bool:
    """Return whether the anchors of a direction form a path."""
    return name.endswith("-path")


# --- The options ---


FROM_ZERO = Constraint(
    "numbers from 0 on", lambda number: number >= 0, "0 is the start.", each=True
)
PREFIX = Constraint(
    "a short part of a file name",
    lambda name: not {*name} & {*'/\\:*?"<>|\0'} and len(name) <= 100,
    "The directory is always that of the run.",
    shown=repr,
)


@dataclass(frozen=True)
class StatsConfig:
    """Measure the checkpoints of a run, sample by sample, in evaluation mode.

    Without --checkpoint, --last or a step it lists the checkpoints. The numbers are written
    into the run's folder stats/, as METRIC-SPLIT[-SETTINGS]-checkpoint-ID.json. A measurement can
    be stopped at any moment, by Ctrl-C or kill -9; the same command continues it. In several
    processes (torchrun --nproc-per-node 2 -m gradfilter stats ...) each measures its part.
    """

    # Not an option: torchrun would take --run for one of its own.
    run: tyro.conf.Positional[Path | None] = None
    """Directory of the run. Without it, the run in --save-dir that fits --data, --model,
    --label-noise, --seed and --name."""
    data: str | None = None
    """Find the run by its data set, such as digits."""
    model: str | None = None
    """Find the run by its model, such as mlp_256."""
    label_noise: float | None = None
    """Find the run by its fraction of wrong labels, in [0, 1)."""
    seed: int | None = None
    """Find the run by its seed."""
    name: str | None = None
    """Find the run by its folder inside --save-dir (NAME)."""
    save_dir: Path = Path("runs")
    """Directory of all runs (SAVE_DIR)."""
    data_dir: Path | None = None
    """Directory of the data sets (DATA_DIR), if it has moved since the training."""

    preset: str | None = None
    """Measurement of a published recipe: double-descent-cifar10 or double-descent-digits. Other
    options override it."""
    config: Path | None = None
    """TOML file with a table [stats]. It overrides a preset; options override both."""

    metric: MetricName = "crossentropy"
    """Quantity to measure."""
    checkpoint: Annotated[tuple[int, ...], FROM_ZERO] = ()
    """Checkpoints to measure: 0 is the start of the training, 1 the next saved one, ..."""
    last: bool = False
    """Measure the last checkpoint."""
    checkpoint_by_step: bool = False
    """Read the numbers of --checkpoint as training steps."""
    nsteps_per_epoch: Annotated[int | None, at_least(1, "Or omit it.")] = None
    """Steps per epoch. Read the numbers of --checkpoint as epochs; needs --checkpoint-by-step."""

    dataset_split: Literal["train", "val", "test"] = "train"
    """Samples to measure on."""
    num_samples: Annotated[int | None, at_least(1, "Or omit it.")] = None
    """Number of samples, in the order of the split; by default all after --skip. Parts whose sizes
    are multiples of --batch-size are joined once they cover the split."""
    skip: Annotated[int, at_least(0, USUAL)] = 0
    """Number of samples to skip at the start of the split."""
    batch_size: Annotated[int, at_least(1, USUAL)] = 64
    """Samples measured at once."""
    restored_targets: bool = False
    """Use the true labels instead of the wrong ones that the run was trained on."""

    gen_strategy: StrategyName = "none"
    """Points around every image: shifted images, images without some singular values, or paths."""
    num_directions: Annotated[int, at_least(1, USUAL)] = 8
    """Number of directions around an image."""
    cumulative: bool = False
    """Write the running mean at every anchor of a path instead of one mean per path."""
    raw_path: bool = False
    """Write every value along the paths, and their distances, instead of means."""

    normalization: Literal["none", "softmax", "logsoftmax", "crossentropy", "jacobian"] = "none"
    """Output to differentiate: logits, probabilities, their logarithms, the loss, or the logits
    with a Jacobian divided by its own Frobenius norm."""
    target_logit_only: bool = False
    """Use only the output of the target class."""
    method: Literal["auto", "gram", "power"] = "auto"
    """Algorithm for operator norms: from J J^T, power iteration, or the faster of both."""
    num_power_iters: Annotated[int, at_least(1, USUAL)] = 50
    """Largest number of power iterations, for operator norms and top eigenvalues."""
    num_probes: Annotated[int, at_least(2, "32 is usual.")] = 32
    """Number of random vectors for the trace of a Hessian."""
    legacy_scale: bool = False
    """Divide tangent metrics by 0.1 instead of the distance to the jittered image."""
    mc_sample_seed: Annotated[int, at_least(0, USUAL)] = 0
    """Seed of jittered images, starting vectors and probes."""
    microbatches: Annotated[int, at_least(2, USUAL)] = 8
    """Number of rows per batch, for agreement."""
    rho: Annotated[float, positive("0.05 is usual.")] = 0.05
    """Radius of the perturbation, for sharpness."""

    bigmem: bool = False
    """Compute all classes at once instead of in chunks."""
    outname: Annotated[str, PREFIX] = ""
    """Prefix of the file name."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, ... (DEVICE). With cuda, each process uses its own GPU."""


# --- Options that are refused before anything is computed ---


OF_SOME = sorted({name for metric in METRICS.values() for name in metric.takes} - {"batch_size"})
"""Settings that only some metrics use. The other metrics refuse them."""


def check_values(config: StatsConfig) -> None:
    """Refuse values that are wrong for every run.

    Raises:
        UsageError: A value is out of range, or two values exclude each other.
    """
    check_fields(config)
    _check_metric(config)
    _check_together(config)


def _check_metric(config: StatsConfig) -> None:
    metric = METRICS[config.metric]
    for name in OF_SOME:
        value = getattr(config, name)
        if value != _default(name) and name not in metric.takes:
            users = ", ".join(m for m, other in METRICS.items() if name in other.takes)
            raise UsageError(
                f"{option_name(name)}: {config.metric} does not depend on it. Omit it, or "
                f"choose a --metric that does: {users}."
            )
    if config.metric == "agreement":
        check(
            config.batch_size % config.microbatches == 0,
            "--batch-size",
            f"a multiple of --microbatches {config.microbatches}",
            config.batch_size,
            f"{config.microbatches * math.ceil(config.batch_size / config.microbatches)} is one.",
        )


def _check_together(config: StatsConfig) -> None:
    _refuse_ignored(config)
    stands = config.gen_strategy == "none"
    on_path = is_path(config.gen_strategy)
    refusals = [
        (
            METRICS[config.metric].per_batch and not stands,
            f"--gen-strategy: {config.metric} is measured on batches, not around images. Omit it.",
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
            "--target-logit-only: the cross-entropy is one output already. Omit it, or "
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
            "Omit the others.",
        ),
    ]
    for refused, line in refusals:
        if refused:
            raise UsageError(line)


def _refuse_ignored(config: StatsConfig) -> None:
    """Refuse settings that have no effect together with the others."""
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
            raise UsageError(f"{option_name(name)}: {why}. Omit it.")


def refuse_unread(config: StatsConfig, typed: Sequence[str]) -> None:
    """Refuse options that search for a run when its directory is given.

    Args:
        config: The settings that the options led to.
        typed: Options on the command line; variables of the environment are not refused.

    Raises:
        UsageError: There is such an option.
    """
    given = typed_names(typed)
    for name in ("--name", "--save-dir"):
        if config.run is not None and name in given:
            raise UsageError(f"RUN and {name}: the directory says which run. Omit {name}.")


def _default(name: str) -> object:
    return next(field.default for field in fields(StatsConfig) if field.name == name)
