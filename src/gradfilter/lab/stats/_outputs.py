"""What a network says about samples, and how right that is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.diagnostics._cotangents import Normalization


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, in float32 or wider. (N, C)."""
    logits: Tensor = model(images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def crossentropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y. (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest logit is the label's, else 0. (N,)."""
    return (logits.argmax(1) == labels).to(logits.dtype)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the probabilities are from certainty, ‖p − onehot(y)‖. (N,)."""
    apart = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    norms: Tensor = torch.linalg.vector_norm(apart, dim=1)
    return norms


def normalised(
    logits: Tensor, labels: Tensor, normalization: Normalization, target_logit_only: bool
) -> Tensor:
    """g, what is differentiated elsewhere, itself. (N, C), or (N, 1) where one number is left.

    Args:
        logits: (N, C).
        labels: (N,).
        normalization: Any but jacobian, which is none of the outputs.
        target_logit_only: The label's entry only.
    """
    if normalization == "crossentropy":
        return crossentropy(logits, labels)[:, None]
    if normalization == "softmax":
        logits = logits.softmax(1)
    elif normalization == "logsoftmax":
        logits = logits.log_softmax(1)
    return logits.gather(1, labels[:, None]) if target_logit_only else logits
