"""Compute accuracy and loss of a model on every split of a data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._types import State
from gradfilter.lab.data._batches import in_order
from gradfilter.lab.data._samples import Data, Samples

PIXELS = 3_072_000
"""Numbers in the images of one forward pass: 1000 images of CIFAR, 20 of ImageNet."""


@torch.no_grad()
def accuracies(model: nn.Module, state: State, data: Data, workers: int = 0) -> dict[str, float]:
    """Compute accuracy and loss on every split; waits for the device once.

    Args:
        model: The structure. Its training mode is restored, its own parameters are not used.
        state: State with the parameters and buffers to measure.
        data: Data set to measure on.
        workers: Number of processes that load images which are not on the device.
    """
    training = model.training
    model.eval()
    try:
        chunk = max(1, min(1000, PIXELS // math.prod(data.shape)))
        splits = (data.train, data.val, data.test)
        sums = [_sums(model, state, split, chunk, workers) for split in splits]
    finally:
        model.train(training)
    of_train, of_val, of_test = torch.stack(sums).tolist()
    wrong = int(data.train.wrong.sum())
    return {
        "train_accuracy": _ratio(of_train[0], len(data.train)),
        "train_clean_accuracy": _ratio(of_train[1], len(data.train)),
        "memorised": _ratio(of_train[2], wrong),
        "train_loss": _ratio(of_train[3], len(data.train)),
        "val_accuracy": _ratio(of_val[0], len(data.val)),
        "val_loss": _ratio(of_val[3], len(data.val)),
        "test_accuracy": _ratio(of_test[0], len(data.test)),
        "test_loss": _ratio(of_test[3], len(data.test)),
    }


def _sums(model: nn.Module, state: State, samples: Samples, chunk: int, workers: int) -> Tensor:
    """Sum what is right by label, right by true label, and memorised, and the loss. (4,)."""
    total = samples.labels.new_zeros(4, dtype=_tree.sum_dtype(samples.labels))
    weights = {**state["params"], **state["buffers"]}
    for images, chosen in in_order(samples, chunk, workers=workers):
        logits = torch.func.functional_call(model, weights, (images,)).float()
        predicted, labels, clean = logits.argmax(1), samples.labels[chosen], samples.clean[chosen]
        right = predicted == labels
        total += torch.stack(
            [
                right.sum(),
                (predicted == clean).sum(),
                (right & (labels != clean)).sum(),
                nn.functional.cross_entropy(logits, labels, reduction="sum"),
            ]
        )
    return total


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
