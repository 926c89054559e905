"""What ``gradfilter stats`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gradfilter.lab.stats._catalogue import MetricName
from gradfilter.lab.stats._strategies import StrategyName


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
