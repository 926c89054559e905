"""Training by gradient agreement filtering under the published package's signature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from gradfilter.interop._gaf import (
    Criterion,
    Pair,
    are_tensors,
    hits,
    logger_of,
    on_device,
    step_gaf,
)


def train_gaf(
    model: nn.Module,
    args: Any,
    train_dataset: Dataset[Any] | Pair,
    val_dataset: Dataset[Any] | Pair,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    *,
    cos_distance_thresh: float = 1.0,
    average: Literal["mean", "halving"] = "halving",
    verbose: bool = False,
    wandb: bool = False,
    use_wandb: bool = False,
    device: torch.device | str | None = None,
) -> list[dict[str, float]]:
    """Train for some epochs with `step_gaf`, and validate after each.

    Every epoch goes through the training data once, in an order drawn from torch's generator.
    Validation is in evaluation mode; the model is left in training mode.

    Args:
        model: Moved to ``device``.
        args: An object or a mapping with ``epochs``, ``batch_size`` (of one microbatch) and
            ``num_batches_to_force_agreement`` (microbatches per step, at least two).
        train_dataset: Of (input, target), or a pair of tensors.
        val_dataset: Likewise; at least one sample.
        optimizer: Of the model's parameters.
        criterion: As in `step_gaf`.
        cos_distance_thresh: As in `step_gaf`.
        average: As in `step_gaf`.
        verbose: Print the result of every epoch.
        wandb: Log steps and epochs to the current run of Weights & Biases.
        use_wandb: The same, as later versions spell it.
        device: None for the model's own.

    Returns:
        One dict per epoch: ``epoch`` from 1, ``train_loss`` and ``train_accuracy``, means over its
        steps, ``val_loss`` and ``val_accuracy``, means over the samples.

    Raises:
        ValueError: Fewer training samples than one step takes, none to validate with, a number in
            ``args`` too small; arguments of `step_gaf`.
        TypeError: A DataLoader in place of a dataset.
        AttributeError: A field of ``args`` is missing.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import train_gaf
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> args = {"epochs": 2, "batch_size": 4, "num_batches_to_force_agreement": 2}
        >>> epochs = train_gaf(model, args, data, data, optimizer, torch.nn.CrossEntropyLoss())
        >>> [result["epoch"] for result in epochs]
        [1, 2]

    References:
        Chaubard, Eddy, Kochenderfer, "Beyond Gradient Averaging in Parallel Optimization: Improved
        Robustness through Gradient Agreement Filtering", 2024, https://arxiv.org/abs/2412.18052
    """
    epochs, size = _field(args, "epochs", 0), _field(args, "batch_size", 1)
    count = _field(args, "num_batches_to_force_agreement", 2)
    train, val = _dataset(train_dataset), _dataset(val_dataset)
    samples = len(cast(Sized, train))
    if not len(cast(Sized, val)):
        raise ValueError("train_gaf: expected validation samples, found none. Give at least one.")
    if samples < size * count:
        raise ValueError(
            f"train_gaf: expected at least batch_size * num_batches_to_force_agreement = "
            f"{size * count} training samples, found {samples}. Use smaller or fewer microbatches."
        )
    log = logger_of(wandb or use_wandb)
    home = next(model.parameters()).device if device is None else torch.device(device)
    model.to(home)
    results = []
    for epoch in range(1, epochs + 1):
        steps = [
            step_gaf(
                model,
                optimizer,
                criterion,
                parts,
                cos_distance_thresh=cos_distance_thresh,
                average=average,
                wandb=wandb or use_wandb,
                device=home,
            )
            for parts in _microbatches(train, samples, size, count)
        ]
        mean = {k: sum(s[k] for s in steps) / len(steps) for k in ("train_loss", "train_accuracy")}
        result = {"epoch": epoch, **mean, **_validate(model, val, size, criterion, home)}
        if verbose:
            print(result)
        log(result)
        results.append(result)
    return results


def _dataset(data: Dataset[Any] | Pair) -> Dataset[Any]:
    if isinstance(data, DataLoader):
        raise TypeError(
            "train_gaf: expected a dataset or a pair of tensors, found DataLoader. Give its "
            ".dataset: batches are made here."
        )
    return TensorDataset(*data) if are_tensors(data) else cast("Dataset[Any]", data)


def _field(args: Any, name: str, least: int) -> int:
    value = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
    if value is None:
        raise AttributeError(
            f"train_gaf: expected args with epochs, batch_size and num_batches_to_force_agreement, "
            f"found no {name!r}. Give all three."
        )
    number = int(value)
    if number < least:
        raise ValueError(
            f"train_gaf: expected args.{name} >= {least}, found {number}. Use {least} or more."
        )
    return number


def _microbatches(
    data: Dataset[Any], samples: int, size: int, count: int
) -> Iterator[list[Subset[Any]]]:
    """The steps of one epoch: every sample at most once, whole steps only."""
    order = torch.randperm(samples)[: samples - samples % (size * count)]
    for step in order.view(-1, count, size).tolist():
        yield [Subset(data, indices) for indices in step]


def _validate(
    model: nn.Module, data: Dataset[Any], size: int, criterion: Criterion, device: torch.device
) -> dict[str, float]:
    model.eval()
    loss = right = samples = 0.0
    with torch.no_grad():
        for batch in DataLoader(data, batch_size=size):
            inputs, targets = on_device(batch, device)
            outputs = model(inputs)
            loss += float(criterion(outputs, targets)) * len(targets)
            right += float(hits(outputs, targets))
            samples += len(targets)
    model.train()
    return {"val_loss": loss / samples, "val_accuracy": right / samples}


train_GAF = train_gaf
"""The published spelling."""
