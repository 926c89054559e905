"""Train with filtered gradients in the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from typing_extensions import override

from gradfilter._types import Transform
from gradfilter.grads._microbatch import Plan
from gradfilter.grads._state_owners import PlainValues, owners_in
from gradfilter.interop._host_chain import filter_chain
from gradfilter.interop._hosted import Hosted, LossLog, check_division, logged
from gradfilter.transforms._compile import Backend

# --- Requirements on training arguments ---


def check_arguments(args: Any) -> None:
    """Refuse arguments under which gradients would not be filtered, or not correctly.

    Args:
        args: The `transformers.TrainingArguments`.

    Raises:
        ValueError: Several devices, loss scaling, or an optimizer inside the backward pass.
    """
    if (devices := max(args.world_size, args.n_gpu)) > 1:
        raise ValueError(
            f"FilteredTrainer: expected one device, found {devices}, which would not see each "
            "other's rows. Make one visible, with CUDA_VISIBLE_DEVICES=0, and start one process."
        )
    if args.fp16:
        raise ValueError(
            "FilteredTrainer: expected full precision or bf16, found fp16=True, whose scaler "
            "wants to scale the losses itself. Use bf16=True."
        )
    if "lomo" in str(args.optim).lower():
        raise ValueError(
            f"FilteredTrainer: expected an optimizer that takes gradients, found {args.optim}, "
            "which steps inside the backward pass, unfiltered. Use another one."
        )


# --- The trainer ---


STATE_FILE = "transforms.pt"

ITEMS = "num_items_in_batch"


@dataclass
class _Metrics:
    """The metrics of the steps since the last log, by name.

    It is a separate object, because attributes of a trainer are restored after a pass.
    """

    since_log: dict[str, list[Tensor]] = field(default_factory=dict)


class FilteredTrainer(Trainer):
    """A `transformers.Trainer` that trains with filtered gradients.

    ``training_step`` computes one gradient per microbatch with `Filtered`, runs the chain and
    writes the result into ``p.grad``; the rest is Trainer's: ``max_grad_norm`` clips the filtered
    gradient, and the scheduler, callbacks, evaluation and checkpoints (with the transforms' state
    in ``transforms.pt``) work as usual. If the chain returns ``keep = False``, the optimizer is not
    called; ``state.global_step`` and the scheduler advance, so that runs end at the planned step.

    The loss of a microbatch comes from ``compute_loss``, also with your own method, a
    ``compute_loss_func`` or label smoothing. It is evaluated for all microbatches at once if
    possible, and for one after another if it changes a number, a module or an object that the
    trainer or ``compute_loss_func`` holds. ``num_items_in_batch`` is the number of items per row,
    so that the mean of all rows is the gradient a Trainer would have computed. With
    ``gradient_accumulation_steps`` k the rows of k batches are filtered together, and the mean is
    over all of them; if the chain acts row by row, one gradient is held (`Filtered.accumulate`). A
    model that accepts ``num_items_in_batch`` and ignores it (BERT for classification) is different
    in Trainer itself, which does not divide its loss by k.

    Logged with Trainer's own: ``keep`` and the metrics of the transforms, averaged over rows
    (``agree_filter/accepted`` is a fraction) and over the steps since the last log; likewise the
    numbers that ``compute_loss`` gives to ``self.log``, such as an accuracy. For one
    device, in full precision or with ``bf16=True``; ``torch_compile`` does not change
    training steps.

    Args:
        *args: See `transformers.Trainer`.
        transforms: A chain that takes rows and ends in a tree, as in `Filtered`.
        microbatches: M rows per batch; None for one row per sample.
        plan: See `Filtered`.
        memory_budget: See `Filtered`.
        compile: See `Filtered`. Every batch shape is compiled, so pad to few lengths
            (``pad_to_multiple_of``).
        reference_batch: The samples whose gradient `reference_filter` follows: inputs of the model
            as the collator gives them, of any size, such as fifty samples with right labels.
        **kwargs: See `transformers.Trainer`.

    Raises:
        TypeError: ``transforms`` does not lead from rows to a tree.
        ValueError: Several devices, ``fp16=True``, an optimizer that works inside the backward
            pass. Before the first step, or at a step if the number of samples is unknown: a batch
            that ``microbatches`` does not divide.

    Examples:
        >>> import tempfile, torch, gradfilter as gf
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import PrinterCallback, TrainingArguments
        >>> from gradfilter.interop import FilteredTrainer
        >>> small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertForSequenceClassification(
        ...     BertConfig(vocab_size=11, intermediate_size=8, max_position_embeddings=6, **small)
        ... )
        >>> data = [{"input_ids": torch.randint(11, (6,)), "labels": i % 2} for i in range(40)]
        >>> quiet = dict(report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=5, logging_steps=5, **quiet)
        ...     trainer = FilteredTrainer(
        ...         model, args, train_dataset=data, transforms=gf.agree_filter(2.0), microbatches=4
        ...     )
        ...     trainer.remove_callback(PrinterCallback)
        ...     result = trainer.train()
        >>> result.global_step
        5
        >>> trainer.state.log_history[0]["agree_filter/accepted"]
        1.0
    """

    transforms: Transform
    microbatches: int | None

    def __init__(
        self,
        *args: Any,
        transforms: Transform,
        microbatches: int | None,
        plan: Plan = "auto",
        memory_budget: int | float | None = None,
        compile: bool | str | Backend = False,
        reference_batch: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked without an optimizer."""
        filter_chain(transforms, guarded=False)
        own = frozenset(vars(self))
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        self.add_callback(_Gate(self))
        self.transforms, self.microbatches = transforms, microbatches
        self.plan: Plan = plan
        self.memory_budget = memory_budget
        self.compile: bool | str | Backend = compile
        self.reference_batch = reference_batch
        self._hosted: Hosted | None = None
        self._train_loader: Any = None
        self._inherited = frozenset(vars(self)) - own
        self._metrics = _Metrics()
        self._loss_log = LossLog("FilteredTrainer")

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one step, and the number of items per row."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._host().begin()
        rows = sum(self._rows_in(batch) for batch in batches)
        return batches, None if items is None else torch.as_tensor(items) / rows

    @override
    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the rows of a batch; with the last one of a step, filter and write ``p.grad``.

        Returns:
            The mean loss over all rows of the step, 0 before its last batch. ().
        """
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers have two sets of parameters
        batch = self._prepare_inputs(inputs)
        hosted = self._host()
        items = num_items_in_batch
        hosted.shared = {} if items is None else {ITEMS: torch.as_tensor(items)}
        with self.compute_loss_context_manager(), _named_remedy():
            if not self.accelerator.sync_gradients:
                return torch.zeros_like(hosted.accumulate(batch))
            reference = None
            if self.reference_batch is not None:
                reference = self._prepare_inputs(dict(self.reference_batch))
            result = hosted.step(batch, reference_batch=reference)
        for name, value in logged(result).items():
            self._metrics.since_log.setdefault(name, []).append(value)
        return result.loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the filter and the values logged by the loss to the training logs."""
        if self._loss_log.is_open:
            for name, value in logs.items():
                self._loss_log.add(name, value)
            return
        if "loss" in logs:
            means = {
                name: torch.stack(v).mean().item() for name, v in self._metrics.since_log.items()
            }
            logs.update(means | logs)  # Trainer's own values take precedence
            self._metrics.since_log = {}
        super().log(logs, start_time)

    def check_batches(self) -> None:
        """Refuse, before the first step, a batch that ``microbatches`` does not divide.

        Raises:
            ValueError: There is such a batch.
        """
        check_division(
            "FilteredTrainer",
            self._train_loader,
            self.microbatches,
            self.state.max_steps * self.args.gradient_accumulation_steps,
            "per_device_train_batch_size",
            "dataloader_drop_last=True",
        )

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's loader, and store it for a check when the number of steps is known."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        self._train_loader = loader
        return loader

    def _host(self) -> Hosted:
        """Return the wrapper for the present model and optimizer."""
        model = cast(nn.Module, self.model)
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        if self._hosted is None or not self._hosted.serves(model, optimizer):
            self._hosted = Hosted(
                model,
                self._microbatch_loss,
                self.transforms,
                optimizer,
                self.microbatches,
                plan=self.plan,
                memory_budget=self.memory_budget,
                compile=self.compile,
                owners=self._owners(model),
            )
        return self._hosted

    def _owners(self, model: nn.Module) -> dict[str, Any]:
        """Return what a loss may change other than the model, by name."""
        owners: dict[str, Any] = {"compute_loss_func": self.compute_loss_func}
        if type(self) is not FilteredTrainer:  # its compute_loss may count, or call modules
            owners["trainer"] = PlainValues(self)
            values: dict[str, Any] = {"class": type(self), "compute_loss": type(self).compute_loss}
            own = vars(self).keys() - self._inherited
            values |= {name: [vars(self)[name]] for name in sorted(own)}
            for name, value in values.items():
                found = owners_in(value, names=True)
                owners[name] = tuple(owner for owner in found if owner is not model)
        return owners

    def _rows_in(self, batch: dict[str, Any]) -> int:
        if self.microbatches is not None:
            return self.microbatches
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        return max((len(tensor) for tensor in tensors if tensor.ndim), default=0)

    def _microbatch_loss(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        model = cast(nn.Module, self.model)
        with self._loss_log.opened() as logged:
            # A pair with the outputs only if those are requested.
            items = self._host().shared.get(ITEMS)
            loss = self.compute_loss(model, inputs, num_items_in_batch=items)
        return cast(Tensor, loss), logged

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        torch.save(self._host().state_dict(), Path(output_dir, STATE_FILE))

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint, STATE_FILE)
        found = file.is_file()
        saved = torch.load(file, map_location="cpu", weights_only=True) if found else None
        self._host().resume(saved, str(file))


@contextmanager
def _named_remedy() -> Iterator[None]:
    """Name Trainer's option for the loader in the error for a batch that does not divide."""
    try:
        yield
    except ValueError as error:
        if "divisible by the number of microbatches" in str(error):
            error.add_note("Of a Trainer: TrainingArguments(dataloader_drop_last=True).")
        raise


class _Gate(TrainerCallback):
    """Disable accelerate's optimizer in the steps that a filter skips.

    An optimizer of accelerate ignores steps while gradients are accumulated. Trainer sets this at
    several places in its loop, and these two events are next to the step.
    """

    def __init__(self, trainer: FilteredTrainer) -> None:
        self._trainer = trainer

    @override
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.check_batches()

    @override
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self._trainer._host().kept:
            self._trainer.accelerator.sync_gradients = False

    @override
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.accelerator.sync_gradients = True
