"""An evaluation of a training, and the evaluations in ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradfilter.lab._run_files import ForeignError, content_of, json_of, reading

# --- One evaluation ---


@dataclass(frozen=True)
class Evaluation:
    """One line of ``metrics.jsonl``; fractions in [0, 1], NaN where there is nothing to measure.

    Means over steps cover the steps since the previous end of an epoch. At the end of an epoch they
    cover that epoch, so they do not depend on how often a run is evaluated.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        samples: Samples seen.
        loss: Mean loss of the batches, against the labels trained on.
        train_accuracy: Accuracy on the training images without augmentation, against the labels
            trained on.
        train_clean_accuracy: The same accuracy, against the true labels.
        memorised: Fraction of the wrong labels that the model predicts.
        train_loss: Loss on the training images without augmentation, against the labels trained on.
        val_accuracy: Accuracy on the validation split.
        val_loss: Loss on the validation split.
        test_accuracy: Accuracy on the test split.
        test_loss: Loss on the test split.
        accepted: Fraction of the rows that were accepted.
        cosine: Mean pairwise cosine of the rows of one batch.
        noise_scale: Simple noise scale of the same batch, in samples.
        skipped: Steps skipped since the start.
        clipped_rows: Fraction of the rows that were clipped.
        clipped_units: Fraction of the units that AGC clipped.
        surrogate_gap: f(w + e) − f(w), the loss at the perturbed weights minus the loss.
        lr: Learning rate of the last step.
        rho: Radius of the perturbation in the last step.
        watch_noise_scale: What --watch measured last in these steps: the noise scale, in rows.
        watch_cosine: The mean cosine of pairs of rows, weighted by their lengths.
        watch_effective_rows: The effective number of rows.
        watch_accepted_fraction: The fraction of the rows with a weight.
        watch_norm_10: Quantiles of the row norms.
        watch_norm_50: The median.
        watch_norm_90: The last decile.
        watch_loss_10: Quantiles of the losses of the rows.
        watch_loss_50: The median.
        watch_loss_90: The last decile.
        seconds: Time spent in training steps since the start.
        samples_per_second: Samples per second in this epoch, in training steps alone.
        peak_memory: Largest number of bytes held during steps: on the GPU if the run uses one, else
            by the whole process.
    """

    step: int
    epoch: float
    samples: int
    loss: float
    train_accuracy: float
    train_clean_accuracy: float
    memorised: float
    train_loss: float
    val_accuracy: float
    val_loss: float
    test_accuracy: float
    test_loss: float
    accepted: float
    cosine: float
    noise_scale: float
    skipped: int
    clipped_rows: float
    clipped_units: float
    surrogate_gap: float
    lr: float
    rho: float
    watch_noise_scale: float
    watch_cosine: float
    watch_effective_rows: float
    watch_accepted_fraction: float
    watch_norm_10: float
    watch_norm_50: float
    watch_norm_90: float
    watch_loss_10: float
    watch_loss_50: float
    watch_loss_90: float
    seconds: float
    samples_per_second: float
    peak_memory: float


# --- Read evaluations ---


NUMBERS = tuple(field.name for field in fields(Evaluation))
FIX = "Remove the line, with which its evaluation is lost, and repeat the command."


def read_evaluations(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read the evaluations in a file; also return whether the last line was cut off.

    Without a file there are no evaluations. A kill may cut the line that is being written, which
    then has no end of line. All lines before it are complete.

    Raises:
        UsageError: The file cannot be read, or one of its other lines is not an evaluation.
    """
    with reading(path, "the metrics", "Move it away, and repeat the command."):
        whole, _, half = content_of(path).rpartition(b"\n") if path.exists() else (b"", b"", b"")
    found = []
    for place, line in enumerate(whole.split(b"\n") if whole else (), 1):
        with reading(path, f"line {place} of the metrics", FIX):
            found.append(_evaluation(json_of(line)))
    return found, bool(half)


def _evaluation(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ForeignError("it is not an evaluation")
    for name in NUMBERS:
        value = found.get(name)
        if value is not None and not isinstance(value, int | float):
            raise ForeignError(f"its {name} is not a number")
        float(value or 0)  # an OverflowError where an integer has hundreds of digits
    return found
