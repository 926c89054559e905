"""The options of ``gradfilter train``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
ScheduleName = Literal["constant", "step", "linear", "cosine", "poly", "plateau"]


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
    """Where torchvision keeps its data sets (DATA_DIR)."""
    download: bool = False
    """Download the data set if it is missing."""
    noise_file: Path | None = None
    """Human labels, for cifar100n-fine."""
    image_size: int = 224
    """Height and width of images from folders, in pixels."""
    data_split_seed: int = 42
    """Seed of the split into train, validation and test."""
    train_split: float | None = None
    """Training samples: a number, or a fraction below 1; None takes all."""
    val_split: float | None = None
    """Validation samples, taken from the training part: a number, or a fraction below 1."""
    label_noise: float = 0.0
    """Fraction of the training labels that are wrong, in [0, 1)."""
    noise_type: Literal["symmetric", "pairflip", "class-concentrated"] = "symmetric"
    """Which labels are wrong, and how."""
    label_seed: int = 42
    """Seed of the wrong labels."""
    augmentation: bool = False
    """Random crops of the padded image, and horizontal flips."""
    crop_flipped_only: bool = False
    """Crop only the images that are flipped."""

    model: str = "mlp_256"
    """resnet18_K, resnet18, resnet34, tv_resnet18, tv_resnet34, cnn_K, cnn5_K, vgg8 to vgg19,
    vit_D, mlp_H, wrn_D_W or lenet."""
    model_additions: tuple[str, ...] = ()
    """What the model has beside its usual parts: batchnorm, dropout-0.1."""
    model_arguments: tuple[str, ...] = ()
    """Sizes that its name does not say, as NAME=NUMBER: width of vgg, patch and depth of vit, depth
    of mlp."""
    weight_init: Literal["pytorch", "fixup", "mfixup", "nkaiming"] = "pytorch"
    """How the parameters start."""

    epochs: float = 50.0
    """Length of the training, in epochs."""
    steps: int | None = None
    """Length of the training in steps, instead of --epochs."""
    batch_size: int | None = None
    """Samples of a step, all microbatches together; 80 unless --samples-per-class says it."""
    microbatches: int = 1
    """Rows per batch, M."""
    per_sample: bool = False
    """One row per sample, instead of --microbatches."""
    samples_per_class: int | None = None
    """Samples of every class in every microbatch: balanced batches instead of shuffled ones."""
    seed: int = 0
    """Seed of initial parameters, batches and augmentation."""

    optimizer: OptimizerName = "sgd"
    """Update rule; sgd+nesterov is sgd with --nesterov."""
    learning_rate: float = 0.05
    """Largest learning rate."""
    momentum: float | None = None
    """0.9 for sgd and 0 for rmsprop unless given."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments, for adam and adamw."""
    eps: float = 1e-8
    """Added to the root, for adam, adamw and rmsprop."""
    alpha: float = 0.99
    """Decay of the squares, for rmsprop."""
    centered: bool = False
    """Divide by the deviation, for rmsprop."""
    weight_decay: float = 0.0
    """L2 decay; decoupled for adamw."""

    schedule: ScheduleName = "constant"
    """Of the learning rate, after its warm-up."""
    lr_step: float = 50.0
    """Epochs from one drop to the next, for step."""
    lr_decay_rate: float = 0.1
    """Factor of a drop, for step and plateau."""
    lr_min: float = 0.0
    """Where linear and cosine end, and below which step, poly and plateau do not fall."""
    lr_power: float = -0.5
    """Exponent of poly, at most 0."""
    lr_patience: int = 10
    """Epochs without improvement that plateau forgives."""
    lr_warmup_epochs: float = 0.0
    """Length of the warm-up."""
    lr_warmup_initial: float = 0.0
    """Learning rate at the first step of the warm-up."""

    agree: float | None = None
    """Merge the microbatches that agree: largest cosine distance, in [0, 2]; 0.97 is usual."""
    against: Literal["running", "first"] = "running"
    """What a microbatch has to agree with."""
    average: Literal["mean", "halving"] = "mean"
    """How the agreeing ones are averaged."""
    consensus: float | None = None
    """Weigh every row by its cosine with the others; without a number 1, which leaves nothing
    to choose."""
    consensus_hard: bool = False
    """Accept or reject instead of weighing."""
    clip_per_row: float | None = None
    """Largest norm of a row."""
    budget_clip: float | None = None
    """Limit the mean norm of the rows: this part of the first step's; 0.3 is a good start."""
    budget_power: float = 3.0
    """How much more of it rows get that agree; 0 compares nothing."""
    agc: float | None = None
    """Adaptive gradient clipping: largest ratio of gradient to weight, unit by unit."""
    agc_eps: float = 1e-3
    """Smallest weight norm that AGC reckons with."""
    agc_exclude: tuple[str, ...] = ()
    """Parameters that AGC leaves alone: patterns of names such as head.*"""
    sam: float | None = None
    """Sharpness-aware minimisation: radius of the perturbation."""
    adaptive: Literal["asam", "gsam"] | None = None
    """Scale the perturbation with the weights: as ASAM does, or as the GSAM paper does."""
    m_sharpness: bool = False
    """Every row has a perturbation of its own."""
    gsam: float | None = None
    """GSAM's alpha; needs --sam."""
    rho_schedule: Literal["constant", "proportional"] = "constant"
    """Whether the radius follows the learning rate, from --sam down to --rho-min."""
    rho_min: float = 0.0
    """Radius where the learning rate is smallest, for proportional."""
    label_smoothing: float = 0.0
    """In [0, 1)."""
    ema: float | None = None
    """Measure and save a moving average of the parameters, which has this decay; 0.99 is usual."""

    eval_every: float = 1.0
    """Epochs from one evaluation to the next."""
    early_exit_accuracy: float | None = None
    """Stop once this part of the training labels is predicted."""
    early_exit_loss: float | None = None
    """Stop once the loss of the training set is at most this."""
    save_checkpoint: tuple[float, ...] = ()
    """One number: every so many epochs. Several: at these epochs. First and last always."""

    resume_every: int = 1000
    """Steps from one point that --resume can go on from to the next, beside the ends of epochs."""
    resume: bool = False
    """Continue the run if it was begun."""
    name: str = ""
    """A folder of its own inside --save-dir (NAME)."""
    save_dir: Path = Path("runs")
    """Where runs are kept (SAVE_DIR)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps, ... (DEVICE)."""
    workers: int = 0
    """Processes that load images (WORKERS); 0 keeps a small data set on the device."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters and images."""
    amp: Literal["none", "bf16"] = "none"
    """Mixed precision."""
    compile: bool = False
    """Compile the model (torch.compile); rows are then computed one by one."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too."""
    wandb: bool = False
    """Send the metrics to Weights & Biases, too."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is said on the way."""


PLACE = ("data_dir", "download", "resume", "name", "save_dir", "device", "workers")
"""Settings that say where or how a run is done, and do not change its numbers (much)."""
WATCHING = ("eval_every", "resume_every", "tensorboard", "wandb", "log_level")
"""Settings that say how a run is watched."""


def setting(config: TrainConfig) -> dict[str, Any]:
    """The settings that make this run another one, where they are not the defaults."""
    own = {"data", "model", "label_noise", "seed", *PLACE, *WATCHING}
    return {
        f.name: value
        for f in fields(config)
        if f.name not in own and (value := getattr(config, f.name)) != f.default
    }
