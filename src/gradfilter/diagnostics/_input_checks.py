"""Check models, samples, targets and numbers of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


def check_model(model: Model) -> None:
    """Refuse a module in training mode, because its samples may depend on each other."""
    if not callable(model):
        raise TypeError(
            f"Expected `model` to be a torch.nn.Module or a function x -> logits, found "
            f"{type(model).__name__}."
        )
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise ValueError(
            "Expected `model` in evaluation mode, found it in training mode, in which BatchNorm "
            "mixes samples and dropout draws at random. Call model.eval() first."
        )


def check_samples(x: Tensor) -> None:
    """Refuse anything but a batch of floating-point samples."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"Expected `x` as a floating-point tensor, found {found}. Derivatives are taken with "
            "respect to it: measure embeddings rather than token numbers."
        )
    if x.ndim < 2 or not x.numel():
        raise ValueError(
            f"Expected `x` of shape (N, *shape) with N >= 1 samples, found {tuple(x.shape)}. Use "
            "x[None] for a single sample."
        )


def check_logits(logits: Tensor, count: int) -> None:
    """Refuse an output that is not one row of logits per sample."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"Expected `model` to return logits as a tensor, found {type(logits).__name__}. Wrap "
            "it: lambda x: model(x).logits."
        )
    if logits.ndim != 2 or len(logits) != count:
        raise ValueError(
            f"Expected logits of shape ({count}, C), found {tuple(logits.shape)}. Wrap the model "
            "in a function that returns one row per sample, for example with .flatten(1)."
        )


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Refuse targets that are not one class of the model per sample."""
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"Expected `targets` as a tensor of class numbers, found {found}.")
    count, classes = logits.shape
    if targets.shape != (count,):
        raise ValueError(
            f"Expected `targets` of shape ({count},), found {tuple(targets.shape)}. Give one class "
            "per sample."
        )
    targets = targets.to(torch.int64)  # eight bits cannot be compared with 300 classes
    # The host reads this once per batch, because a wrong index would destroy a CUDA context.
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ValueError(
            f"Expected `targets` in 0 .. {classes - 1}, found {int(targets.min())} .. "
            f"{int(targets.max())}. The model has {classes} outputs."
        )


def check_at_least(name: str, value: float, low: float, fix: str) -> None:
    """Refuse a number below ``low``, and NaN."""
    if not value >= low:
        raise ValueError(f"Expected `{name}` >= {low}, found {name}={value!r}. {fix}")


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown option."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` as one of {', '.join(choices)}, found {value!r}.")


def at_once(chunk_size: int | None, count: int, device: torch.device) -> int:
    """Return the number of cotangents to pull back together.

    One forward pass over about 32 samples keeps two cores busy, and larger tensors do not fit into
    the cache; a GPU needs many more.
    """
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1, "Use None to have it chosen.")
        return chunk_size
    return max(1, (32 if device.type == "cpu" else 1024) // count)
