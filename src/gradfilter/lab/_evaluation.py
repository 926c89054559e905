"""How good a training is where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter.lab._crew import ALONE, Crew
from gradfilter.lab._digits import Digits
from gradfilter.lab._training import Training


@dataclass(frozen=True)
class Evaluation:
    """One line of the metrics; fractions in [0, 1], NaN where there is nothing to measure.

    Attributes:
        run: Name of the method.
        seed: Of split, noise, initial parameters and batches.
        step: Steps done.
        test_accuracy: On the test split, whose labels are clean.
        train_clean_accuracy: On the training images, by their true labels.
        memorised: Part of the wrong labels that the model predicts.
        accepted: Part of the rows accepted, over all steps so far.
        skipped: Steps skipped so far.
        loss: Mean loss of the batches, by the labels trained on, since the evaluation before.
        seconds: Spent in training steps so far, evaluation not counted.
    """

    run: str
    seed: int
    step: int
    test_accuracy: float
    train_clean_accuracy: float
    memorised: float
    accepted: float
    skipped: int
    loss: float
    seconds: float


@torch.no_grad()
def evaluate(training: Training, data: Digits, crew: Crew = ALONE) -> Evaluation:
    """Measure a training where it stands; the only place that waits for the device."""

    def predict(images: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(
            training.model, training.state["params"], (images,)
        )
        return out.argmax(1)

    train, wrong = predict(data.images), data.wrong
    counts = [
        (predict(data.test_images) == data.test_labels).sum(),
        (train == data.clean).sum(),
        ((train == data.labels) & wrong).sum(),
        wrong.sum(),
        torch.as_tensor(training.skipped, device=wrong.device),
    ]
    right, clean, memorised, corrupted, skipped = torch.stack(counts).tolist()
    losses, training.losses = training.losses, []
    return Evaluation(
        run=training.method.name,
        seed=training.seed,
        step=training.done,
        test_accuracy=right / len(data.test_labels),
        train_clean_accuracy=clean / len(data.clean),
        memorised=memorised / corrupted if corrupted else math.nan,
        accepted=float(training.accepted) / training.rows if training.rows else math.nan,
        skipped=skipped,
        loss=crew.mean(torch.stack(losses).mean()).item() if losses else math.nan,
        seconds=training.seconds,
    )
