"""Train with filtered gradients in PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from gradfilter import _tree
from gradfilter._shards import refuse_sharding_options, reshard
from gradfilter._types import Transform
from gradfilter.distributed._rank_stack import check_leaves_alike
from gradfilter.distributed._ranks import ALONE, Ranks
from gradfilter.grads._batch import samples_in
from gradfilter.grads._microbatch import Plan
from gradfilter.interop._filtered import StepResult
from gradfilter.interop._host_ranks import (
    check_batches,
    copy_buffers,
    gathered_states,
    logged_over_ranks,
    over_all_ranks,
    states_of_rank,
)
from gradfilter.interop._host_shards import (
    OverShards,
    check_copies_alike,
    check_over_shards,
)
from gradfilter.interop._hosted import (
    LIVE,
    WEIGHTS,
    Hosted,
    LossLog,
    check_division,
    log_weights,
    logged,
    padded,
    samples_first,
)
from gradfilter.transforms._compile import Backend

# --- Requirements on a LightningModule ---


REQUIRED = {
    "transforms": "transforms = gf.agree_filter(0.97)",
    "microbatches": "microbatches = 8 (or None, for one row per sample)",
}


def check_fit(module: Any) -> None:
    """Refuse a fit that would not be filtered, or not correctly.

    Args:
        module: A `LightningModule` with a trainer.

    Raises:
        TypeError: The module does not meet the requirements.
        ValueError: The trainer does not meet them.
    """
    name = type(module).__name__
    for attribute, example in REQUIRED.items():
        if not hasattr(module, attribute):
            raise TypeError(
                f"{name}: expected an attribute {attribute!r}, found none. Give the class one: "
                f"{example}."
            )
    if not module.automatic_optimization:
        raise TypeError(
            f"{name}: expected automatic optimization, whose hooks FilteredModule fills, found "
            "automatic_optimization = False. Leave it as it is."
        )
    check_strategy(name, module)


FLAT = DeepSpeedStrategy, FSDPStrategy
"""The strategies that shard flat copies of the parameters, whose pieces are no parameters."""


def check_strategy(name: str, module: Any) -> None:
    """Refuse a strategy whose processes would not train as one.

    Args:
        name: The beginning of the error.
        module: A `LightningModule` with a trainer.

    Raises:
        ValueError: A strategy that shards parameters, or is unknown; options that replace what the
            filter does.
    """
    strategy = module.trainer.strategy
    kind = type(strategy).__name__
    if isinstance(strategy, FLAT):
        raise ValueError(
            f'{name}: expected strategy "ddp" or ModelParallelStrategy, found {kind}, which gives '
            "every process a part of parameters that it has joined. For parameters too large for "
            "one device use L.Trainer(strategy=ModelParallelStrategy(tensor_parallel_size=1, "
            "data_parallel_size=...)), with fully_shard in configure_model (FSDP2)."
        )
    if isinstance(strategy, ModelParallelStrategy):
        check_sharded(name, module)
        return
    if module.trainer.world_size == 1:
        return
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f'{name}: expected strategy "ddp" for {module.trainer.world_size} processes, found '
            f'{kind}. Use L.Trainer(strategy="ddp"), "ddp_spawn" or "ddp_notebook", or devices=1.'
        )
    if strategy._ddp_comm_hook is not None or strategy._model_averaging_period is not None:
        raise ValueError(
            f"{name}: expected a DDPStrategy without ddp_comm_hook and model_averaging_period, "
            "found one, which would never be used: the rows are exchanged by across_ranks. Leave "
            "it out."
        )
    check_own_statistics(name, module)


def check_own_statistics(name: str, module: nn.Module) -> None:
    """Refuse rows that depend on rows of other processes."""
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        raise ValueError(
            f"{name}: expected rows that do not depend on rows of other processes, found "
            "SyncBatchNorm. Use L.Trainer(sync_batchnorm=False): every microbatch has its own "
            "statistics, as in one process."
        )


def check_sharded(name: str, module: Any) -> None:
    """Refuse what is not possible with parameters that ModelParallelStrategy shards.

    Args:
        name: The beginning of the error.
        module: A `LightningModule` with a trainer.

    Raises:
        ValueError: Tensor parallelism, or an option that needs whole parameters.
    """
    strategy, batches = module.trainer.strategy, module.trainer.accumulate_grad_batches
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"{name}: expected tensor_parallel_size=1, with other samples in every process, found "
            f"{size}. Use ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size="
            f"{module.trainer.world_size}), or a loop with gradfilter.interop.Filtered and "
            'across_ranks(mesh.get_group("data_parallel")).'
        )
    check_own_statistics(name, module)
    own = type(module)
    check_over_shards(
        name,
        (
            OverShards(
                batches > 1,
                f"accumulate_grad_batches={batches}",
                "Use larger batches and more microbatches, which with memory_budget=0 hold little "
                "in addition.",
            ),
            OverShards(module.uneven, "uneven = True", "Use DataLoader(..., drop_last=True)."),
            OverShards(
                own.sample_groups is not FilteredModule.sample_groups,
                "sample_groups",
                "Let the loader put the samples of a group into one microbatch.",
            ),
            OverShards(
                own.reference_batch is not FilteredModule.reference_batch,
                "reference_batch",
                'Use reference_filter("average"), or strategy "ddp".',
            ),
            OverShards(
                module.compile_step is not False,
                f"compile_step = {module.compile_step!r}",
                "Leave it out.",
            ),
            OverShards(
                module.plan not in ("auto", "fused"), f"plan = {module.plan!r}", 'Use "auto".'
            ),
        ),
    )


def is_parallel(module: Any) -> bool:
    """Return whether the strategy of a fit lets the user shard the parameters."""
    return isinstance(module.trainer.strategy, ModelParallelStrategy)


# --- Loss scaling ---


def scaler_of(module: Any) -> torch.amp.GradScaler | None:
    """Return the scaler of precision "16-mixed", or None."""
    scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler


@contextmanager
def without_scaler(module: Any) -> Iterator[None]:
    """Let the trainer clip and step as in full precision: the rows are unscaled already."""
    plugin, scaler = module.trainer.precision_plugin, scaler_of(module)
    if scaler is not None:
        plugin.scaler = None
    try:
        yield
    finally:
        if scaler is not None:
            plugin.scaler = scaler


# --- DistributedDataParallel ---


def wrapper_of(module: Any) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around a `LightningModule` in a fit, if there is one."""
    model = module.trainer.strategy.model
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DistributedDataParallel) else None


def turn_off_reducer(module: Any) -> None:
    """Let DistributedDataParallel wait for no gradients, because its backward pass never comes.

    Hooks of parameters run a backward pass of their own, on the filtered gradient, which is equal
    on all ranks. A reducer that waits for the other parameters would fail at the next batch.
    """
    if (wrapper := wrapper_of(module)) is not None:
        wrapper.require_backward_grad_sync = False


def share_buffers(module: Any) -> None:
    """Let DistributedDataParallel copy the buffers of rank 0 to all before the next batch.

    It does so after every synchronised backward pass, as at the end of a step.
    """
    if (wrapper := wrapper_of(module)) is not None:
        wrapper.require_forward_param_sync = True


# --- The module ---


CHECKPOINT_KEY = "gradfilter"
RANKS_KEY = "gradfilter_ranks"


class FilteredModule(lightning.LightningModule):
    """A `LightningModule` that trains with filtered gradients.

    Derive from it, set ``transforms`` and ``microbatches``, and write ``microbatch_loss`` in
    place of ``training_step``. The rest of the module, and the trainer, need no changes.

    It is a mixin for Lightning's *automatic* optimization that fills four hooks: ``training_step``
    computes the rows (`Filtered`), ``backward`` and ``optimizer_zero_grad`` do nothing, and
    ``optimizer_step`` does not call the optimizer if the chain returns ``keep = False``. So
    schedulers of every interval, ``accumulate_grad_batches``, ``gradient_clip_val`` (on the
    filtered gradient), callbacks and checkpoints are Lightning's own.

    As under mixed precision, ``trainer.global_step`` and the schedulers count a skipped step, so
    that runs end at the planned step. With ``accumulate_grad_batches`` k the rows of k
    batches are filtered together; if the chain acts row by row, one gradient is held
    (`Filtered.accumulate`). Logged once per step: ``train_loss``, ``keep`` and the metrics
    of the transforms, averaged over rows (``agree_filter/accepted`` is a fraction), and what
    ``microbatch_loss`` gives to ``self.log``, such as an accuracy (or a ``train_loss`` of its own),
    likewise. The transforms' state is in Lightning's checkpoint. For ``precision`` "32-true",
    "64-true", "bf16-true", "bf16-mixed" and "16-mixed": a row that overflows is rejected, not the
    step, and the trainer's scaler is updated and saved as in `Filtered`.

    With strategy "ddp" (or "ddp_spawn", "ddp_notebook") the rows of all processes are one stack:
    `across_ranks` is put in front of a chain without one. M is the number of rows of each process,
    so that there are W·M. Everything logged in a training step is the mean over the rows of all
    processes, with ``sync_dist`` or without, and the same on all. What an epoch has logged, buffers
    (those of rank 0), checkpoints and samplers are as always in Lightning. States of transforms
    before an ``across_ranks`` of your own differ between processes; all of them are in the
    checkpoint. Every process needs as many batches as the others, and as many rows: with ``uneven``
    rows without samples take no part.

    With ``ModelParallelStrategy(tensor_parallel_size=1)`` and ``fully_shard`` in
    ``configure_model`` (FSDP2, HSDP) the same holds for parameters that are sharded: the rows are
    of whole parameters, the filtered gradient is sharded. Checkpoints, also those of shards, hold
    the transforms' state as whole tensors, and resume with any number of processes. Refused at the
    start: ``accumulate_grad_batches``, ``uneven``, `sample_groups`, `reference_batch`,
    ``compile_step``, a MixedPrecisionPolicy (precision "bf16-mixed" is autocast, and works), and
    copies of a parameter that differ between processes. "fsdp" and DeepSpeed are refused.

    For a last batch that is not full, set ``uneven = True``. For padding, or samples of unequal
    importance, write a method `sample_weights`; for one row per user or task, `sample_groups`.

    Attributes:
        transforms: A chain that takes rows and ends in a tree, as in `Filtered`.
        microbatches: M rows per batch; None for one row per sample.
        plan: See `Filtered`.
        memory_budget: See `Filtered`.
        uneven: True for batches whose size M need not divide: see `microbatch_grads`.
        compile_step: ``compile`` of `Filtered`; `torch.nn.Module` has a method of that name.

    Raises:
        TypeError: At the start of a fit: ``transforms`` or ``microbatches`` are missing;
            ``transforms`` does not lead from rows to a tree; an optimizer that evaluates
            the loss again.
        ValueError: At the start of a fit: a strategy that shards joined parameters, or an option
            that is not possible with sharded ones. Before the first step, or at a step if the
            number of samples is unknown: a batch that ``microbatches`` does not divide (with
            ``uneven``, one of fewer samples). At a step, on all ranks: other numbers of rows or
            batches than on other ranks.

    Examples:
        >>> import warnings, torch, lightning as L, gradfilter as gf
        >>> from gradfilter.interop import FilteredModule
        >>> warnings.filterwarnings("ignore", module="lightning")
        >>> class Net(FilteredModule):
        ...     transforms = gf.agree_filter(2.0)
        ...     microbatches = 4
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 2)
        ...
        ...     def microbatch_loss(self, batch):
        ...         x, y = batch
        ...         return torch.nn.functional.cross_entropy(self.linear(x), y)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 2), torch.arange(40) % 2)
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet
        ... )
        >>> trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=8))
        >>> trainer.global_step
        5
        >>> sorted(trainer.callback_metrics)
        ['agree_filter/accepted', 'agree_filter/cosine', 'keep', 'train_loss']
    """

    transforms: Transform
    microbatches: int | None
    plan: Plan = "auto"
    memory_budget: int | float | None = None
    uneven: bool = False
    compile_step: bool | str | Backend = False

    _hosted: Hosted | None = None
    _saved: dict[str, Tensor] | None = None
    _saved_of_ranks: dict[str, Tensor] | None = None
    _resumes = False
    _loss_log: LossLog | None = None

    def microbatch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of the samples of one microbatch. Subclasses must write this method.

        It is evaluated for all microbatches at once if possible: call the module's layers and
        return the loss. For numbers given to ``self.log`` here, the mean over all microbatches is
        logged once per step; every microbatch must log the same names.

        Args:
            batch: A batch of the data loader, with its leading axis cut to B samples.

        Raises:
            TypeError: The subclass has no such method.
        """
        raise TypeError(
            f"Expected a method microbatch_loss(self, batch) in {type(self).__name__}, found "
            "none. Return the mean loss of the batch from it, as training_step would."
        )

    def reference_batch(self) -> Any:
        """Return the samples whose gradient `reference_filter` follows in this step; None for none.

        Override it to return a batch as ``microbatch_loss`` takes one, of any size, such as fifty
        samples with right labels. It is moved to the device.
        """
        return None

    def sample_weights(self, batch: Any) -> Tensor | None:
        """Return one weight >= 0 per sample, (N,); None for none. 0 removes a sample (padding).

        Override it to return a tensor on the device of the batch, such as ``batch["weight"]``. The
        loss of a row is then the weighted mean over its samples (see `GradFunction`), so
        ``microbatch_loss`` must return one number per sample, (B,) (``reduction="none"``); with
        `sample_groups` also, it may return a mean. Of the numbers given to ``self.log``, those of
        rows without weights are omitted from the means.

        Args:
            batch: A batch of the data loader.
        """
        return None

    def sample_groups(self, batch: Any) -> Tensor | None:
        """Return the row of each sample, from 0 to M − 1, (N,) int64; None for microbatches.

        These are the ``groups`` of `GradFunction`: a row is the (weighted) mean of the gradients of
        its samples, each computed alone, so ``microbatch_loss`` gets batches of one sample. For
        numbers of any size: ``torch.unique(batch["user"], return_inverse=True)[1]``, with
        ``microbatches`` the largest number of users in a batch.

        Args:
            batch: A batch of the data loader.
        """
        return None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the rows of a batch; with the last one of a step, filter and write ``p.grad``.

        Returns:
            The mean loss of the rows that were not reported yet: of this batch, or of the step. ().
        """
        hosted = self._host()
        if hosted.ranks.size > 1:
            self._check_batch(batch_idx, hosted)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            hosted.begin()
        weights, groups = self.sample_weights(batch), self.sample_groups(batch)
        hosted.shared = {}
        if self.uneven and groups is None and hosted.ranks.size > 1:
            batch, weights = self._fill_rows(batch, weights, hosted)
        inputs = {"batch": batch} if weights is None else {"batch": batch, WEIGHTS: weights}
        if not hosted.completes_step:
            return hosted.accumulate(inputs, sample_weights=weights, groups=groups)
        reference = self.reference_batch()
        if reference is not None:
            reference = {"batch": self.trainer.strategy.batch_to_device(reference)}
        result = hosted.step(
            inputs, reference_batch=reference, sample_weights=weights, groups=groups
        )
        assert self._loss_log is not None  # the wrapper exists, so the log does
        self._log_step(result, hosted.ranks)
        return result.loss

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because the gradients were computed with the loss.

        Raises:
            TypeError: The loss comes from another ``training_step``.
        """
        if loss.requires_grad:
            raise TypeError(
                f"Expected the loss of FilteredModule.training_step, found {type(self).__name__}'s "
                "own, whose gradients are not filtered. Rename it to microbatch_loss(self, batch)."
            )

    @override
    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Do nothing, because filtered gradients replace those of the step before."""

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Let the trainer clip and step, unless the chain skips the step."""
        assert optimizer_closure is not None  # the trainer always has one
        hosted = self._host()
        hosted.kept, hosted.completes_step = False, True
        try:
            loss = optimizer_closure()
        finally:
            hosted.completes_step = False
        share_buffers(self)
        if is_parallel(self):
            copy_buffers(self, hosted.ranks)
        if hosted.kept:
            with without_scaler(self):
                super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Detect an ``optimizer_step`` that bypassed the filter.

        Raises:
            TypeError: The optimizer is about to step with gradients of another step.
        """
        super().on_before_optimizer_step(optimizer)
        if not self._host().kept:
            raise TypeError(
                "Expected steps through FilteredModule.optimizer_step, found one of "
                f"{type(self).__name__}'s own, before anything was filtered. Call "
                "super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure) in it."
            )

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as in `LightningModule`; in ``microbatch_loss``, log the value of one microbatch.

        Raises:
            TypeError: ``microbatch_loss`` logs a metric with a state.
            ValueError: ``microbatch_loss`` logs more than one number.
        """
        if self._loss_log is None or not self._loss_log.is_open:
            super().log(name, value, *args, **kwargs)
        else:
            self._loss_log.add(name, value, *args, **kwargs)

    @override
    def setup(self, stage: str) -> None:
        """Compare the parameters of all processes, before DistributedDataParallel sends them."""
        super().setup(stage)
        if stage == TrainerFn.FITTING and self.trainer.world_size > 1:
            check_strategy(type(self).__name__, self)
            if not is_parallel(self):  # whose layers may be made later; `across_ranks` compares
                check_leaves_alike(dict(self.named_parameters()), Ranks.of(None))

    @override
    def on_fit_start(self) -> None:
        """Check the module and the trainer before the first batch."""
        super().on_fit_start()
        self._host()

    @override
    def on_train_start(self) -> None:
        """Check before the first batch that all batches can be cut into microbatches."""
        super().on_train_start()
        if type(self).sample_groups is not FilteredModule.sample_groups:
            return  # samples of any number belong to the rows
        trainer = self.trainer
        if self.uneven and trainer.world_size > 1:
            return  # rows without samples take no part
        batches = trainer.num_training_batches
        if trainer.max_steps >= 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        check_division(
            type(self).__name__,
            trainer.train_dataloader,
            self.microbatches,
            batches,
            "the batch size of the training data",
            "DataLoader(..., drop_last=True)",
            self.uneven,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the transforms' state into the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self._hosted is not None:
            own, ranks = self._hosted.state_dict(), self._hosted.ranks
            checkpoint[CHECKPOINT_KEY] = own
            if of_ranks := gathered_states(self._hosted.transforms, own, ranks):
                checkpoint[RANKS_KEY] = of_ranks

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the transforms' state until there is an optimizer."""
        super().on_load_checkpoint(checkpoint)
        # Weights are also loaded for tests or for a new training run.
        self._resumes = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self._saved = checkpoint.get(CHECKPOINT_KEY) if self._resumes else None
        self._saved_of_ranks = checkpoint.get(RANKS_KEY) if self._resumes else None

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy, without the wrapper; Lightning also omits the trainer."""
        own = ("_hosted", "_loss_log")
        return {key: v for key, v in super().__getstate__().items() if key not in own}

    def _loss(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._loss_log is not None  # the wrapper exists, so the log does
        with self._loss_log.opened() as logged:
            loss = self.microbatch_loss(inputs["batch"])
        log_weights(logged, inputs.get(WEIGHTS))
        return loss, logged

    def _check_batch(self, batch_idx: int, hosted: Hosted) -> None:
        """Check that no rank waits for one that has no more batches."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if batch_idx and None not in map(sized_len, _tree.leaves(trainer.train_dataloader)):
            return  # known since the first one
        ends = hosted.completes_step and trainer.global_step + 1 == trainer.max_steps
        is_last = trainer.is_last_batch or batch_idx + 1 >= batches or ends
        check_batches(type(self).__name__, hosted.ranks, batches, is_last)

    def _fill_rows(
        self, batch: Any, weights: Tensor | None, hosted: Hosted
    ) -> tuple[Any, Tensor | None]:
        """Give a batch as many rows as those of other ranks; rows without samples take no part."""
        size, rows = samples_in(batch), self.microbatches
        if rows is None:
            rows = int(hosted.ranks.gather_on_host(torch.tensor([size])).max())
        if size >= rows:
            return batch, weights
        if weights is not None:
            weights = torch.cat([weights, weights.new_zeros(rows - size)])
        hosted.shared = {LIVE: samples_first(rows, size, self.device)}
        return padded(batch, rows), weights

    def _log_step(self, result: StepResult, ranks: Ranks) -> None:
        """Log the loss and the numbers of a step over the rows of all ranks."""
        assert self._loss_log is not None  # the wrapper exists, so the log does
        numbers = (
            {"train_loss": result.loss} | logged(result)
            if ranks.size == 1
            else logged_over_ranks(type(self).__name__, result, ranks)
        )
        options = {"train_loss": ((), {"prog_bar": True}), **self._loss_log.options}
        for name, value in numbers.items():
            args, kwargs = options.get(name, ((), {}))
            if ranks.size > 1:  # a sum over equal numbers would be W times the number
                adds = kwargs.get("reduce_fx") in ("sum", torch.sum, sum)
                kwargs = kwargs | {"sync_dist": bool(kwargs.get("on_epoch")) and not adds}
            self.log(name, value, *args, **kwargs)

    def _host(self) -> Hosted:
        """Return the wrapper of this fit, which has its own optimizer."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        if self._hosted is None or not self._hosted.serves(self, optimizer):
            check_fit(self)
            ranks = self._ranks
            if is_parallel(self):
                reshard(self.modules())
                refuse_sharding_options(self)
                check_copies_alike(type(self).__name__, self, ranks)
            turn_off_reducer(self)
            self._loss_log = LossLog(type(self).__name__)
            self._hosted = Hosted(
                self,
                self._loss,
                over_all_ranks(self.transforms, ranks),
                optimizer,
                self.microbatches,
                plan=self.plan,
                memory_budget=self.memory_budget,
                uneven=self.uneven,
                compile=self.compile_step,
                scaler=scaler_of(self),
                ranks=ranks,
            )
        if self._resumes:  # a checkpoint of shards is read after the first hooks
            saved, of_ranks = self._saved, self._saved_of_ranks
            if saved is not None and of_ranks is not None:
                ranks = self._hosted.ranks
                saved = states_of_rank(type(self).__name__, saved, of_ranks, ranks)
            self._hosted.resume(saved, "the checkpoint")
        self._resumes, self._saved, self._saved_of_ranks = False, None, None
        return self._hosted

    @property
    def _ranks(self) -> Ranks:
        """The processes of the trainer."""
        several = self.trainer.world_size > 1 or is_parallel(self)
        return Ranks.of(None) if several else ALONE
