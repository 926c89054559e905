"""Define the options of ``gradfilter train``, and their groups in ``--help``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from gradfilter.lab._constraints import (
    FRACTION,
    SWITCH_OFF,
    USUAL,
    Constraint,
    at_least,
    at_most,
    below_one,
    distance,
    positive,
)

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "lion", "muon", "per_example_adam")
"""The update rules of gradfilter; torch:NAME is a class of torch.optim."""
ScheduleName = Literal["constant", "step", "linear", "cosine", "poly", "plateau"]

# --- Constraints of single fields ---


LONGEST = 1e9
"""Largest number of epochs whose steps can be counted."""
MOST = 2**24
"""Largest number of rows, and of samples per class in one row."""


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _is_showable(name: str) -> bool:
    longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
    return name.isprintable() and longest <= 255


COUNTABLE = at_most(LONGEST, "Take a smaller one.")
ACCURACY = Constraint(
    "a fraction in (0, 1]", lambda value: value <= 1, "0.99 is 99 % of the training labels."
)
NOT_ONE = Constraint(
    "a fraction below 1, or a number of samples above 1",
    lambda value: value != 1,
    "Omit it to take all samples.",
)
BETAS = Constraint("two numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas))
FACTOR = Constraint("a factor between 0 and 1", lambda value: 0 < value < 1, USUAL)
QUANTILE = Constraint("a level in (0, 1]", lambda level: 0 < level <= 1, "0.5 is the median.")
DISTANCE = distance("0.97 is usual, 2 accepts everything.")
SAVED = Constraint(
    f"epochs above 0, at most {LONGEST:g}",
    lambda epoch: 0 < epoch <= LONGEST,
    "The first and the last are always saved.",
    each=True,
)
INSIDE = Constraint("a folder inside --save-dir", _is_inside)
SHOWABLE = Constraint(
    "at most 255 bytes of text that can be shown", _is_showable, "It names a folder.", shown=repr
)

# --- The options ---


@dataclass(frozen=True)
class TrainConfig:
    """Train one model on one data set, following the gradients you choose.

    Every epoch is counted by samples: --epochs 10 sees ten times as many samples as there are,
    however they are cut into microbatches. A run can be stopped at any moment, by Ctrl-C or
    kill -9, and --resume continues it as if nothing had happened.
    """

    data: str = "digits"
    """digits, cifar10, cifar100, cifar100n-fine:FILE (or with --noise-file), synthetic,
    synthetic-uniform, synthetic-normal, synthetic-hypersphere, or folder:PATH (ImageFolder)."""
    data_dir: Path = Path("data")
    """Directory of torchvision's data sets (DATA_DIR)."""
    download: bool = False
    """Download the data set if it is missing."""
    noise_file: Path | None = None
    """File of human labels, for cifar100n-fine."""
    image_size: Annotated[int, positive()] = 224
    """Side of images from folders, in pixels."""
    data_split_seed: Annotated[int, at_least(0)] = 42
    """Seed of the split into train, validation and test."""
    train_split: Annotated[float | None, at_least(0, SWITCH_OFF), NOT_ONE] = None
    """Training samples: a number, or a fraction below 1; by default all."""
    val_split: Annotated[float | None, at_least(0, SWITCH_OFF), NOT_ONE] = None
    """Validation samples out of the training part: a number, or a fraction below 1."""
    label_noise: Annotated[float, FRACTION] = 0.0
    """Fraction of wrong training labels, in [0, 1)."""
    noise_type: Literal["symmetric", "pairflip", "class-concentrated"] = "symmetric"
    """Kind of wrong labels."""
    label_seed: Annotated[int, at_least(0)] = 42
    """Seed of the wrong labels."""
    augmentation: bool = False
    """Augment by random crops and horizontal flips."""
    crop_flipped_only: bool = False
    """Crop only the images that are flipped."""

    model: str = "mlp_256"
    """resnet18_K, resnet18, resnet34, tv_resnet18, tv_resnet34, cnn_K, cnn3_K, cnn5_K, vgg8 to
    vgg19, vit_D, mlp_H, wrn_D_W or lenet; cnn3_16 is made for the digits."""
    model_additions: tuple[str, ...] = ()
    """Additional layers: batchnorm, dropout-0.1."""
    model_arguments: tuple[str, ...] = ()
    """Other sizes, as NAME=NUMBER: width of vgg, patch and depth of vit, depth of mlp."""
    weight_init: Literal["pytorch", "fixup", "mfixup", "nkaiming"] = "pytorch"
    """Initialisation of the parameters."""

    epochs: Annotated[float, positive(), COUNTABLE] = 50.0
    """Length of the training in epochs."""
    steps: Annotated[int | None, positive(SWITCH_OFF)] = None
    """Length of the training in steps, instead of --epochs."""
    batch_size: int | None = None
    """Samples per step, over all microbatches; by default 80."""
    microbatches: Annotated[int, at_least(1), at_most(MOST)] = 1
    """Number of rows per batch, M."""
    per_sample: bool = False
    """Use one row per sample, instead of --microbatches."""
    samples_per_class: Annotated[int | None, positive(SWITCH_OFF), at_most(MOST, "Take fewer.")] = (
        None
    )
    """Samples of every class per microbatch, for balanced batches."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of parameters, batches and augmentation."""

    optimizer: str = "sgd"
    """Update rule: sgd, adam, adamw, rmsprop, lion, muon, per_example_adam, or torch:NAME, a class
    of torch.optim such as torch:RAdam; sgd+nesterov is sgd with --nesterov, muon has adamw for all
    but matrices. A class of torch gets the learning rate and the weight decay of the options, and
    keeps its own defaults in all else."""
    optimizer_arguments: tuple[str, ...] = ()
    """Arguments of the class of torch:NAME that have no option, as NAME=VALUE: lr_decay=0.1,
    amsgrad=true, etas=0.5,1.2."""
    learning_rate: Annotated[float, positive()] = 0.05
    """Largest learning rate."""
    momentum: Annotated[float | None, below_one("a number")] = None
    """Momentum, by default 0.9 for sgd, 0 for rmsprop and 0.95 for muon, and as the class has it
    for torch:NAME."""
    nesterov: bool = False
    """Use Nesterov's momentum, for sgd and torch:SGD."""
    betas: Annotated[tuple[float, float], BETAS] = (0.9, 0.999)
    """Decay rates of the moments, for adam, adamw, muon, per_example_adam, classes of torch with
    betas, and lion, for which 0.9 0.99 is usual."""
    eps: Annotated[float, positive()] = 1e-8
    """Number added to the root, for all update rules but sgd, lion and those of torch:NAME whose
    own eps is another: they keep it unless --optimizer-arguments sets it."""
    alpha: Annotated[float, FRACTION] = 0.99
    """Decay rate of the squares, for rmsprop and torch:RMSprop."""
    centered: bool = False
    """Divide by the deviation, for rmsprop and torch:RMSprop."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """L2 decay; decoupled for adamw, lion and muon. It is 0 by default for torch:AdamW also."""
    no_decay: tuple[str, ...] = ()
    """Parameters without weight decay: patterns of names, such as *.bias (PATTERN)."""
    cautious: bool = False
    """Leave out the entries of an update that point against the gradient."""
    schedule_free: bool = False
    """Average the parameters; the average is evaluated and saved. Its share is --momentum, or the
    first of --betas."""
    msam: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Momentum-SAM: radius of the perturbation along the momentum, which is not evaluated."""

    schedule: ScheduleName = "constant"
    """Schedule of the learning rate after its warm-up."""
    lr_step: Annotated[float, positive(), COUNTABLE] = 50.0
    """Epochs between two drops, for step."""
    lr_decay_rate: Annotated[float, FACTOR] = 0.1
    """Factor of each drop, for step and plateau."""
    lr_min: Annotated[float, at_least(0)] = 0.0
    """Smallest learning rate of a schedule."""
    lr_power: Annotated[float, at_most(0, USUAL)] = -0.5
    """Exponent of poly, at most 0."""
    lr_patience: Annotated[int, at_least(0)] = 10
    """Epochs without improvement before plateau drops."""
    lr_warmup_epochs: Annotated[float, at_least(0), COUNTABLE] = 0.0
    """Length of the warm-up in epochs."""
    lr_warmup_initial: Annotated[float, at_least(0)] = 0.0
    """Learning rate at the start of the warm-up."""

    agree: Annotated[float | None, DISTANCE] = None
    """Average agreeing microbatches: largest cosine distance, in [0, 2]; 0.97 is usual."""
    against: Literal["running", "first"] = "running"
    """Gradient that a microbatch has to agree with."""
    average: Literal["mean", "halving"] = "mean"
    """Average of the agreeing microbatches."""
    agree_per: Literal["leaf", "layer"] | None = None
    """Compare microbatches on every parameter tensor, or on every layer, by itself."""
    agree_exclude: tuple[str, ...] = ()
    """Parameters that are not compared: patterns of names such as head.*"""
    consensus: Annotated[float | None, DISTANCE] = None
    """Weight rows by their cosine with the others: largest distance in [0, 2], 1 if omitted."""
    consensus_hard: bool = False
    """Accept or reject rows instead of weighting them."""
    trimmed_mean: Annotated[int | None, positive(SWITCH_OFF)] = None
    """Average without the K largest and K smallest values of every coordinate (K)."""
    coordinate_median: bool = False
    """Take the median of the rows in every coordinate."""
    geometric_median: bool = False
    """Take the point with the smallest sum of distances to the rows."""
    centered_clip: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Move the last gradient towards the rows, each by at most this radius (RADIUS)."""
    clip_per_row: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Largest norm of each row."""
    clip_quantile: Annotated[float | None, QUANTILE] = None
    """Clip each row to this quantile of the norms of earlier steps; 0.5 is the median."""
    clip_smallest: bool = False
    """Clip all rows to the norm of the smallest."""
    clip_per_leaf: bool = False
    """Clip every leaf of a row separately, with --clip-per-row, -quantile or -smallest."""
    normalize_rows: Annotated[float | None, at_least(0, SWITCH_OFF)] = None
    """Divide each row by its norm plus this number; 0.01 is usual."""
    outlier_filter: Annotated[float | None, at_least(1, SWITCH_OFF)] = None
    """Remove rows longer than this factor times the median; 3 is usual."""
    trim_losses: Annotated[float | None, FRACTION] = None
    """Fraction of the rows to remove, those of highest loss."""
    budget_clip: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Largest mean norm of the rows, relative to the first step; 0.3 is usual."""
    budget_power: Annotated[float, at_least(0)] = 3.0
    """Exponent that favours agreeing rows in the budget; 0 treats all alike."""
    reference: Literal["clean", "average", "previous"] | None = None
    """Weight rows by their products with a gradient: of clean samples, or of earlier steps."""
    reference_samples: Annotated[int, at_least(1)] = 50
    """Number of training samples with their true labels, for --reference clean."""
    agc: Annotated[float | None, at_least(0, SWITCH_OFF)] = None
    """Adaptive gradient clipping: largest ratio of gradient to weight per unit."""
    agc_eps: Annotated[float, positive()] = 1e-3
    """Smallest weight norm for AGC."""
    agc_exclude: tuple[str, ...] = ()
    """Parameters without AGC: patterns of names such as head.*"""
    sam: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Sharpness-aware minimisation: radius of the perturbation."""
    adaptive: Literal["asam", "gsam"] | None = None
    """Scale the perturbation by the weights, as in ASAM or in the GSAM paper."""
    m_sharpness: bool = False
    """Perturb each row separately."""
    friendly_sam: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Part of an average gradient to leave out of the perturbation; 1 is usual; needs --sam."""
    look_sam: Annotated[int | None, at_least(2, SWITCH_OFF)] = None
    """Perturb in every K-th step, and reuse the effect (LookSAM); 5 is usual; needs --sam."""
    gsam: Annotated[float | None, at_least(0, SWITCH_OFF)] = None
    """Alpha of GSAM; needs --sam."""
    spike_clip: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Clip a gradient so many standard deviations above the earlier norms; 2.5 is usual."""
    adagc: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Clip every leaf of a gradient to this multiple of its mean norm (AdaGC); 1.05 is usual."""
    spike_skip: Annotated[float | None, positive(SWITCH_OFF)] = None
    """Skip a step with a norm or loss so many deviations above the last ones; 6 is usual."""
    rho_schedule: Literal["constant", "proportional"] = "constant"
    """Schedule of the radius: proportional follows the learning rate."""
    rho_min: Annotated[float, at_least(0)] = 0.0
    """Radius at the smallest learning rate, for proportional."""
    label_smoothing: Annotated[float, FRACTION] = 0.0
    """Label smoothing, in [0, 1)."""
    ema: Annotated[float | None, below_one("a decay", SWITCH_OFF)] = None
    """Decay of a moving average of parameters to evaluate and save; 0.99 is usual."""

    watch: Annotated[int | None, positive(SWITCH_OFF)] = None
    """Measure noise, cosines and quantiles of the rows in every K-th step."""
    eval_every: Annotated[float, positive(), COUNTABLE] = 1.0
    """Epochs between two evaluations."""
    early_exit_accuracy: Annotated[float | None, positive(SWITCH_OFF), ACCURACY] = None
    """Stop at this accuracy on the training labels."""
    early_exit_loss: Annotated[float | None, at_least(0, SWITCH_OFF)] = None
    """Stop at this loss on the training set."""
    save_checkpoint: Annotated[tuple[float, ...], SAVED] = ()
    """Epochs between checkpoints (one number) or of checkpoints (several)."""

    resume_every: Annotated[int, positive()] = 1000
    """Steps between points to resume from, in addition to the ends of epochs."""
    resume: bool = False
    """Continue the run if it exists."""
    name: Annotated[str, INSIDE, SHOWABLE] = ""
    """Folder inside --save-dir (NAME)."""
    save_dir: Path = Path("runs")
    """Directory of all runs (SAVE_DIR)."""
    device: str = "cpu"
    """Device: cpu, cuda, cuda:1, mps, ... (DEVICE)."""
    workers: Annotated[int, at_least(0)] = 0
    """Processes that load images (WORKERS); 0 keeps small data on the device."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of parameters and images."""
    amp: Literal["none", "bf16"] = "none"
    """Mixed precision."""
    compile: bool = False
    """Compile the whole step (gradfilter.compile); the first step takes a minute."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Smallest level of log messages."""


GROUPS: Mapping[str, tuple[str, ...]] = {
    "data": (
        *("data", "data_dir", "download", "noise_file", "image_size", "data_split_seed"),
        *("train_split", "val_split", "label_noise", "noise_type", "label_seed"),
        *("augmentation", "crop_flipped_only"),
    ),
    "model": ("model", "model_additions", "model_arguments", "weight_init", "label_smoothing"),
    "rows and filters": (
        *("batch_size", "microbatches", "per_sample", "samples_per_class", "agree", "against"),
        *("average", "agree_per", "agree_exclude", "consensus", "consensus_hard"),
        *("trimmed_mean", "coordinate_median", "geometric_median", "centered_clip"),
        *("reference", "reference_samples", "clip_per_row", "clip_quantile", "clip_smallest"),
        *("clip_per_leaf", "normalize_rows", "outlier_filter", "trim_losses"),
        *("budget_clip", "budget_power", "spike_clip", "adagc", "spike_skip"),
        *("agc", "agc_eps", "agc_exclude", "sam", "adaptive", "m_sharpness"),
        *("friendly_sam", "look_sam", "gsam", "rho_schedule", "rho_min"),
    ),
    "update": (
        *("optimizer", "optimizer_arguments", "learning_rate", "momentum", "nesterov", "betas"),
        *("eps", "alpha"),
        *(
            "centered",
            "weight_decay",
            "no_decay",
            "cautious",
            "schedule_free",
            "msam",
            "ema",
            "seed",
        ),
    ),
    "schedule": (
        *("epochs", "steps", "schedule", "lr_step", "lr_decay_rate", "lr_min", "lr_power"),
        *("lr_patience", "lr_warmup_epochs", "lr_warmup_initial", "early_exit_accuracy"),
        "early_exit_loss",
    ),
    "output": (
        *("watch", "eval_every", "save_checkpoint", "resume_every", "resume", "name", "save_dir"),
        *("tensorboard", "wandb", "log_level"),
    ),
    "resources": ("device", "workers", "dtype", "amp", "compile"),
}
"""Settings by the heading under which ``--help`` lists them."""
PLACE = ("data_dir", "download", "resume", "name", "save_dir", "device", "workers")
"""Settings of the place and manner of a run, which hardly change its numbers."""
WATCHING = ("watch", "eval_every", "resume_every", "tensorboard", "wandb", "log_level")
"""Settings of what a run reports."""


def setting(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that identify a run, where they differ from the defaults."""
    own = {"data", "model", "label_noise", "seed", *PLACE, *WATCHING}
    return {
        f.name: value
        for f in fields(config)
        if f.name not in own and (value := getattr(config, f.name)) != f.default
    }
