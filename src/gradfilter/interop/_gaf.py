"""Gradient agreement filtering under the signatures of the published package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

from gradfilter._types import Params
from gradfilter.grads._loss import ModelLoss, insert
from gradfilter.grads._microbatch import Plan, microbatch_grads
from gradfilter.grads._stack import DenseStack, GradStack
from gradfilter.interop._host_chain import check_owned, note_skip, write_grads
from gradfilter.interop._host_loss import (
    check_criterion,
    check_module,
    has_compiled,
    original_of,
    renormalised,
    view_of,
)
from gradfilter.interop._sam import check_steps_alone
from gradfilter.transforms._agreement import agree_filter

# --- One step ---


Pair = tuple[Tensor, Tensor]
Criterion = Callable[[Any, Tensor], Tensor]


def step_gaf(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    list_of_microbatches: Sequence[Dataset[Any] | Pair],
    *,
    cos_distance_thresh: float = 1.0,
    average: Literal["mean", "halving"] = "halving",
    verbose: bool = False,
    wandb: bool = False,
    use_wandb: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Filter the gradients of some microbatches, and step if at least two of them agree.

    It works in place: the model is put into training mode, its buffers are updated by every
    microbatch, the filtered gradient stays in ``p.grad``, and on a skip the optimizer is not
    called.

    Args:
        model: The model; frozen parameters are not changed.
        optimizer: An optimizer of the model's parameters.
        criterion: ``criterion(model(inputs), targets)``, a mean over samples.
        list_of_microbatches: At least two, each a dataset of (input, target) or a pair of tensors.
            They may differ in size.
        cos_distance_thresh: The threshold of `agree_filter`, 1 − cos, in [0, 2].
        average: See `agree_filter`; ``"halving"`` is that of the published package, ``"mean"``
            that of the paper. For two microbatches they are equal.
        verbose: True to print the result.
        wandb: True to log the result to the current run of Weights & Biases.
        use_wandb: The spelling of ``wandb`` in later versions.
        device: The device for the microbatches; None for the model's own.

    Returns:
        ``train_loss``, the mean over all samples; ``cosine_distance`` of the last microbatch;
        ``agreed_count``, the number of accepted microbatches minus one; ``train_accuracy``, NaN if
        targets are not classes.

    Raises:
        ValueError: Fewer than two microbatches, a threshold below 0, or a DistributedDataParallel.
        TypeError: An optimizer whose step needs a closure.
        ModuleNotFoundError: ``wandb`` is requested and not installed.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import step_gaf
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> parts = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
        >>> result = step_gaf(model, optimizer, torch.nn.CrossEntropyLoss(), parts)
        >>> sorted(result)
        ['agreed_count', 'cosine_distance', 'train_accuracy', 'train_loss']

    References:
        Chaubard, Eddy, Kochenderfer, "Beyond Gradient Averaging in Parallel Optimization: Improved
        Robustness through Gradient Agreement Filtering", 2024, https://arxiv.org/abs/2412.18052
    """
    check_module("step_gaf", model)
    check_steps_alone("step_gaf", optimizer, "Use one that needs no closure.")
    filter_ = agree_filter(cos_distance_thresh, average=average)
    if len(list_of_microbatches) < 2:
        raise ValueError(
            f"step_gaf: expected at least two microbatches, found {len(list_of_microbatches)}: one "
            "has nothing to agree with. Cut the batch into more parts."
        )
    check_criterion("step_gaf", original_of(model), criterion, optimizer)
    view = view_of(model, criterion)
    check_owned(view, optimizer, "step_gaf")
    log = logger_of(wandb or use_wandb)
    home = next(model.parameters()).device if device is None else torch.device(device)
    batches = [on_device(part, home) for part in list_of_microbatches]
    model.train()
    params: Params = {name: p for name, p in view.named_parameters() if p.requires_grad}
    loss = _CountedLoss(view, criterion, in_place=True)
    plan: Plan = "loop" if has_compiled(model, criterion) else "auto"
    with renormalised(view):
        rows = _rows_of(loss, {name: p.detach() for name, p in params.items()}, batches, plan)
    with torch.no_grad():
        grads, _, out = filter_.update(rows, filter_.init(params), params)
    insert(view, {}, rows.buffers)
    optimizer.zero_grad()
    if bool(out["keep"]):
        write_grads(view, optimizer, grads)
        optimizer.step()
    else:
        note_skip(optimizer)
    # Filled on the device: a list would be copied from the host.
    sizes = torch.stack([torch.full((), float(len(y)), device=home) for _, y in batches])
    assert rows.losses is not None  # rows of batches always have their losses
    result = {
        "train_loss": float((rows.losses * sizes).sum() / sizes.sum()),
        "cosine_distance": float(1 - out["cosine"][-1]),
        "agreed_count": max(int(out["accepted"].sum()) - 1, 0),
        "train_accuracy": float(rows.aux.sum()) / float(sizes.sum()),
    }
    if verbose:
        print(result)
    log(result)
    return result


def logger_of(wandb: bool) -> Callable[[dict[str, float]], Any]:
    """Return the function that logs results: that of Weights & Biases, or an empty one."""
    if not wandb:
        return lambda result: None
    try:
        log: Callable[[dict[str, float]], Any] = import_module("wandb").log
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected the package wandb, which wandb=True logs to, found none. Install wandb, or "
            "leave wandb=False and log the result yourself."
        ) from error
    return log


def are_tensors(data: Any) -> TypeGuard[Pair]:
    """Return whether data are inputs and targets, not a dataset (which may be a list)."""
    listed = isinstance(data, (tuple, list)) and len(data) > 1
    return listed and all(isinstance(part, Tensor) for part in data)


def on_device(part: Dataset[Any] | Pair, device: torch.device) -> Pair:
    """Move the inputs and targets of a microbatch to the device."""
    if not are_tensors(part):
        dataset = cast("Dataset[Any]", part)
        part = next(iter(DataLoader(dataset, batch_size=len(cast(Sized, part)))))
    inputs, targets = part[0], part[1]
    return inputs.to(device), targets.to(device)


@dataclass(frozen=True, eq=False)
class _CountedLoss(ModelLoss):
    """The pure loss of a module; its aux is the number of correctly classified samples, ()."""

    has_aux: bool = field(default=True, init=False)

    @override
    def _apply_criterion(self, output: Any, targets: Any) -> tuple[Any, Tensor]:
        loss = super()._apply_criterion(output, targets)
        return loss, correct_count(output, targets).float()  # half precision cannot count to 300


def correct_count(outputs: Any, targets: Tensor) -> Tensor:
    """Return the number of correctly classified samples, NaN without classes. ()."""
    classes = isinstance(outputs, Tensor) and outputs.ndim == 2 and targets.ndim == 1
    if not classes or targets.is_floating_point():
        return torch.full((), torch.nan, device=targets.device)
    right: Tensor = outputs.detach().argmax(1) == targets
    return right.sum()


def _rows_of(loss: ModelLoss, params: Params, batches: list[Pair], plan: Plan) -> GradStack:
    """Return one row per microbatch: all at once if their shapes agree, else one by one."""
    if len({(x.shape, y.shape) for x, y in batches}) == 1:
        inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return microbatch_grads(loss, len(batches), plan=plan)(params, (inputs, targets))
    found, buffers = [], None
    for batch in batches:
        rows = microbatch_grads(loss, 1, plan=plan)(params, batch, buffers=buffers)
        buffers = rows.buffers
        found.append((rows.stacked(), rows.losses, rows.aux))
    grads, losses, hits = zip(*found, strict=True)
    stacked = {name: torch.cat([g[name] for g in grads]) for name in params}
    return DenseStack(stacked, torch.cat(losses), buffers or {}, torch.cat(hits))


step_GAF = step_gaf
"""The name in the published package."""


# --- Training ---


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

    Every epoch uses the training data once, in an order drawn from torch's generator. Validation
    runs in evaluation mode; afterwards the model is in training mode.

    Args:
        model: The model, which is moved to ``device``.
        args: An object or a mapping with ``epochs``, ``batch_size`` (of one microbatch) and
            ``num_batches_to_force_agreement`` (microbatches per step, at least two).
        train_dataset: A dataset of (input, target), or a pair of tensors.
        val_dataset: A dataset of the same form, with at least one sample.
        optimizer: An optimizer of the model's parameters.
        criterion: See `step_gaf`.
        cos_distance_thresh: See `step_gaf`.
        average: See `step_gaf`.
        verbose: True to print the result of every epoch.
        wandb: True to log steps and epochs to the current run of Weights & Biases.
        use_wandb: The spelling of ``wandb`` in later versions.
        device: The device of the training; None for the model's own.

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
    """Yield the steps of one epoch: every sample at most once, complete steps only."""
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
            right += float(correct_count(outputs, targets))
            samples += len(targets)
    model.train()
    return {"val_loss": loss / samples, "val_accuracy": right / samples}


train_GAF = train_gaf
"""The name in the published package."""
