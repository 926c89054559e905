"""Train with filtered gradients in the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from typing_extensions import override

from gradfilter import _tree
from gradfilter._shards import is_sharded, refuse_sharding_options, reshard
from gradfilter._types import Transform
from gradfilter.distributed._rank_stack import check_leaves_alike
from gradfilter.distributed._ranks import ALONE, Ranks
from gradfilter.grads._batch import mark_samples, rows_of_samples, samples_in
from gradfilter.grads._microbatch import Plan
from gradfilter.grads._state_owners import PlainValues, owners_in
from gradfilter.interop._host_chain import filter_chain
from gradfilter.interop._host_ranks import averaged, copy_buffers, differ, over_all_ranks
from gradfilter.interop._host_shards import (
    OverShards,
    check_copies_alike,
    check_over_shards,
    has_shards,
)
from gradfilter.interop._hosted import (
    LIVE,
    ROWS,
    WEIGHTS,
    BatchSizes,
    Hosted,
    LossLog,
    check_division,
    log_weights,
    logged,
    mark_rows,
    samples_first,
    sizes_in,
    sizes_of_sampler,
)
from gradfilter.transforms._compile import Backend

# --- Requirements on training arguments ---


OTHER_PARALLELISM = {
    "FSDP": "joins parameters before it shards them (version 1)",
    "DEEPSPEED": "runs the backward pass and the optimizer itself",
    "MEGATRON_LM": "runs the backward pass and the optimizer itself",
    "XLA": "traces the whole step",
}
"""The kinds of distributed training of accelerate that are refused, and what each of them does."""


def check_arguments(args: Any) -> None:
    """Refuse arguments under which gradients would not be filtered, or not correctly.

    Args:
        args: The `transformers.TrainingArguments`.

    Raises:
        ValueError: Several devices in one process, or an optimizer inside the backward pass.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"FilteredTrainer: expected one device in a process, found {args.n_gpu}, for which "
            "Trainer takes DataParallel. Start one process per device, with torchrun "
            f"--nproc-per-node {args.n_gpu} or accelerate launch, or make one device visible, with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if "lomo" in str(args.optim).lower():
        raise ValueError(
            f"FilteredTrainer: expected an optimizer that takes gradients, found {args.optim}, "
            "which steps inside the backward pass, unfiltered. Use another one."
        )


def check_processes(accelerator: Any, drop_last: bool, uneven: bool) -> None:
    """Refuse kinds of distributed training other than equal batches by DDP or FSDP2.

    Args:
        accelerator: The trainer's `accelerate.Accelerator`.
        drop_last: True if a last batch that is not full is omitted.
        uneven: ``uneven`` of the trainer.

    Raises:
        ValueError: Models that are split in other ways, another engine, or batches that differ
            between ranks.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    split = getattr(accelerator, "parallelism_config", None) is not None
    if (kind in OTHER_PARALLELISM and not is_fsdp2(accelerator)) or split:
        found = "a parallelism_config" if split else kind
        does = "splits models or batches" if split else OTHER_PARALLELISM[kind]
        raise ValueError(
            f"FilteredTrainer: expected data parallelism, with the whole model in every process or "
            f"sharded by FSDP2, found {found}, which {does}. Start the processes with torchrun or "
            "accelerate launch without it; for parameters too large for one device use "
            'TrainingArguments(fsdp=True, fsdp_config={"version": 2}), or fsdp_version: 2 in the '
            "configuration of accelerate."
        )
    together = accelerator.even_batches or drop_last or uneven
    if accelerator.num_processes > 1 and not together:
        raise ValueError(
            "FilteredTrainer: expected as many rows on every rank, found even_batches=False, which "
            "gives ranks last batches of other sizes, or none. Leave it at True, use "
            "FilteredTrainer(uneven=True) for rows without samples, which take no part, or omit "
            "the last batch with dataloader_drop_last=True."
        )


def is_fsdp2(accelerator: Any) -> bool:
    """Return whether `accelerate` shards the parameters by `fully_shard`."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def check_fsdp2(accelerator: Any, model: Any) -> None:
    """Refuse options of FSDP2 in accelerate that change what a pass over all rows would compute.

    Args:
        accelerator: The trainer's `accelerate.Accelerator`.
        model: The trainer's model, before it is sharded.

    Raises:
        ValueError: Mixed precision, offloaded or compiled parameters, or a model that is sharded
            already.
    """
    if not is_fsdp2(accelerator):
        if isinstance(model, nn.Module) and has_shards(model):
            raise ValueError(
                "FilteredTrainer: expected a whole model, or one that accelerate shards, found "
                "one that was sharded when it was loaded. Load it without a distributed_config or "
                'tp_plan, and use TrainingArguments(fsdp=True, fsdp_config={"version": 2}).'
            )
        return
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    dtypes = {getattr(policy, key, None) for key in ("param_dtype", "output_dtype")} - {None}
    precision = str(accelerator.mixed_precision)
    if precision != "no" or dtypes:
        found = f"mixed_precision={precision}" if precision != "no" else str(policy)
        raise ValueError(
            f"FilteredTrainer: expected no mixed precision with FSDP2, found {found}: accelerate "
            "casts by a MixedPrecisionPolicy, which is applied by hooks that do not run in a pass "
            "over all rows. Use bf16=False and fp16=False, and load the model in the dtype of its "
            "training, such as from_pretrained(..., dtype=torch.bfloat16)."
        )
    from torch.distributed.fsdp import CPUOffloadPolicy

    check_over_shards(
        "FilteredTrainer",
        (
            OverShards(
                isinstance(plugin.cpu_offload, CPUOffloadPolicy),
                "offload_params (cpu_offload)",
                "Switch it off: shards must be on the device of their rank.",
            ),
            OverShards(
                str(getattr(accelerator.state.dynamo_plugin.backend, "value", "NO")) != "NO",
                "torch_compile",
                "Leave it out: rows are not computed by the compiled module.",
            ),
        ),
    )


def sizes_on_rank(loader: Any, ranks: int) -> BatchSizes | None:
    """Return the sizes of the batches of one of several processes, or None if they are unknown.

    Args:
        loader: A loader from `accelerate`. Unless it reads in one process for all, it completes
            last batches with the first samples, so that all have one size.
        ranks: The number of processes.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, BatchSamplerShard):
        shard = cast(Any, sampler)
        size = shard.batch_size and shard.batch_size // (ranks if shard.split_batches else 1)
        return BatchSizes(1, size, 0) if size else None
    sizes = sizes_in(loader)
    if sizes is None or not isinstance(loader, DataLoaderDispatcher):
        return sizes
    # The batch of all processes is read by the first one, and completed to a multiple of them.
    together = 1 if loader.split_batches else ranks
    full, rest = divmod(sizes.full, together)
    last = rest * sizes.size + sizes.last
    return BatchSizes(full, sizes.size * together // ranks, -(-last // ranks))


def check_sizes_known(sampler: Any) -> None:
    """Refuse a sampler whose last batches cannot be known to have samples of their own.

    Raises:
        ValueError: It is not a `BatchSampler` of a known number of samples.
    """
    if sizes_of_sampler(sampler) is None:
        raise ValueError(
            "FilteredTrainer: expected batches of known sizes with even_batches=False and "
            f"uneven=True, found {type(sampler).__name__}. Use a torch.utils.data.BatchSampler, or "
            "leave even_batches at True."
        )


def last_sizes(loader: Any) -> list[int] | None:
    """Return the sizes of the last batches of all processes, without samples that complete them.

    Args:
        loader: A loader from `accelerate` that completes last batches.

    Returns:
        None if they are full, omitted, or of an unknown number of samples.
    """
    shard: Any = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard):
        return None
    shard = cast(Any, shard)
    of_all, ranks = shard.batch_sampler, shard.num_processes
    sizes = sizes_of_sampler(of_all)
    if sizes is None:
        return None
    together = 1 if shard.split_batches else ranks  # batches of one step
    rest = sizes.full % together * sizes.size + sizes.last
    each = sizes.size * together // ranks
    if rest == 0 or of_all.drop_last:
        return None
    return [min(max(rest - each * rank, 0), each) for rank in range(ranks)]


# --- Columns of a batch that hold weights and groups of samples ---


def check_columns(
    weights: str | None,
    groups: str | None,
    microbatches: int | None,
    reference: Mapping[str, Any] | None,
) -> None:
    """Refuse names of columns that cannot be right.

    Args:
        weights: ``sample_weights`` of the trainer.
        groups: ``groups`` of the trainer.
        microbatches: M, or None.
        reference: ``reference_batch`` of the trainer.

    Raises:
        TypeError: They are not names.
        ValueError: Both are one name; there are groups without a number of rows; samples of a
            reference batch have unequal weights.
    """
    for argument, name in {"sample_weights": weights, "groups": groups}.items():
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"FilteredTrainer: expected {argument} as the name of a column of the batch, found "
                f"{type(name).__name__}. Put the numbers into the data set, or let the collator "
                f'add them, and give their name, as in {argument}="weight".'
            )
    if weights is not None and weights == groups:
        raise ValueError(
            f"FilteredTrainer: expected two columns for sample_weights and groups, found {groups!r}"
            " for both. Give each a name of its own."
        )
    if groups is not None and microbatches is None:
        raise ValueError(
            "FilteredTrainer: expected a number of rows with groups=, found microbatches=None. "
            "Give the largest number of groups in a batch, such as per_device_train_batch_size: "
            "rows without samples take no part."
        )
    given = torch.as_tensor((reference or {}).get(weights or "", 1))
    if bool(given.ne(given.flatten()[:1]).any()):
        raise ValueError(
            f"FilteredTrainer: expected a reference batch whose samples count the same, found "
            f"unequal weights {weights!r} in it. Leave samples of weight 0 out of it."
        )


def number_groups(groups: Tensor) -> Tensor:
    """Number the different values from 0, in the order in which they appear. (N,) int64."""
    same = groups[:, None] == groups  # (N, N)
    first = same.long().argmax(1)
    is_first = first == torch.arange(len(groups), device=groups.device)
    return (is_first.cumsum(0) - 1)[first]


@dataclass(frozen=True, eq=False)
class _Samples:
    """The samples of a batch whose weights and rows are given by columns.

    Attributes:
        inputs: The other columns, for the model.
        weights: The weight of each sample; 0 also for one without items. (N,) float.
        index: The row of each sample. (N,) int64.
        items: The number of items of each sample (counted labels), or None. (N,) float.
        rows: M.
    """

    inputs: dict[str, Any]
    weights: Tensor
    index: Tensor
    items: Tensor | None
    rows: int

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over the samples of each row. (M,)."""
        return values.new_zeros(self.rows).index_add(0, self.index, values)

    def share_of_items(self, per_row: Tensor) -> Tensor:
        """Return for each sample the number by which to divide the sum of its items' losses. (N,).

        The weighted mean over the samples of a row is then the weighted sum over all their items,
        divided by ``per_row`` (M,).
        """
        total = self.sums(self.weights)
        each = (per_row / torch.where(total == 0, 1.0, total))[self.index]
        return torch.where(each == 0, 1.0, each).to(torch.get_default_dtype())


# --- The trainer ---


STATE_FILE = "transforms.pt"

RANK_FILE = "transforms-{}-of-{}.pt"
"""The state on one of several ranks, if their states differ: rank, number of ranks."""

ITEMS = "num_items_in_batch"


@dataclass
class _Metrics:
    """The metrics of the steps since the last log, by name.

    Attributes:
        since_log: The numbers of each step.
        share: The share of this process in the rows of a step, times the number of processes.
        last: The sizes of the last batches of all processes, if they are not full.

    It is a separate object, because attributes of a trainer are restored after a pass.
    """

    since_log: dict[str, list[Tensor]] = field(default_factory=dict)
    share: float = 1.0
    last: list[int] | None = None


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
    numbers that ``compute_loss`` gives to ``self.log``, such as an accuracy. In full
    precision, with ``bf16=True`` or with ``fp16=True`` (a row that overflows is rejected, not the
    step, and accelerate's scaler is updated and saved as in `Filtered`); ``torch_compile`` does not
    change training steps.

    **Several processes**, from ``torchrun`` or ``accelerate launch``, each with the whole model:
    the rows of all are one stack, by `across_ranks` in front of a chain that has none, so the
    training is that of one process with all rows. What is logged is the mean over the processes;
    buffers are copied from the first one after every step; a state of transforms before
    `across_ranks` is saved by each process. With ``uneven`` and accelerate's
    ``even_batches=False`` last batches have other sizes: rows without samples take no part.

    **FSDP2**, ``TrainingArguments(fsdp=True, fsdp_config={"version": 2})`` or accelerate's
    ``fsdp_version: 2``: the same training, with parameters that are sharded over the processes.
    ``transforms.pt`` has whole tensors, for any number of processes. Refused at the start:
    ``gradient_accumulation_steps``, ``uneven``, ``sample_weights``, ``groups``,
    ``reference_batch``, ``compile``, ``torch_compile``, ``bf16`` and ``fp16`` (load the model in
    the dtype of its training), and parameters offloaded to the CPU. FSDP of version 1, DeepSpeed,
    Megatron and a parallelism_config are refused. With one process this needs torchrun, too.

    **Weights and groups** are columns of the batch, from the data set or the collator. They reach
    neither the model nor ``compute_loss``, and ``remove_unused_columns`` keeps them; an evaluation
    ignores them. Each sample's loss is then computed alone, as ``compute_loss`` gives it for one
    sample, so a model that returns a mean needs no change, but BatchNorm in training mode is
    refused (see ``groups`` of `GradFunction`). With ``num_items_in_batch``, the mean of all rows is
    the gradient of Σ w_n l_i / Σ w_n over all items i of the samples n of a step: weights of 1
    change nothing, and a weight of 0 is a sample without labels. With groups, a row is this mean
    over the items of its own samples, so all groups count the same. A loss that is not divided by
    ``num_items_in_batch`` is averaged over the samples of each row, Σ w_n l_n / Σ w_n, so with one
    row per sample a weight only removes it. Numbers given to ``self.log`` are averaged over the
    samples that have a weight.

    Args:
        *args: See `transformers.Trainer`.
        transforms: A chain that takes rows and ends in a tree, as in `Filtered`.
        microbatches: M rows per batch; None for one row per sample.
        plan: See `Filtered`.
        memory_budget: See `Filtered`.
        uneven: True for batches whose size M need not divide, such as the last of an epoch: see
            `microbatch_grads`.
        sample_weights: The name of the column with one weight >= 0 per sample; 0 removes a sample.
        groups: The name of the column with a whole number per sample, such as a user's: samples of
            one number are a row, and a batch may have up to ``microbatches`` different ones. Rows
            are in the order in which the numbers appear.
        compile: See `Filtered`. Every batch shape is compiled, so pad to few lengths
            (``pad_to_multiple_of``).
        reference_batch: The samples whose gradient `reference_filter` follows: inputs of the model
            as the collator gives them, of any size, such as fifty samples with right labels.
        **kwargs: See `transformers.Trainer`.

    Raises:
        TypeError: ``transforms`` does not lead from rows to a tree.
        ValueError: Several devices, an optimizer that works inside the backward pass; an option
            that is not possible with sharded parameters; ``groups`` without ``microbatches``.
            Before the first step, or at a step if the number of samples is unknown: a batch that
            ``microbatches`` does not divide (with ``uneven``, one of fewer samples). At a step: a
            column is missing, or holds wrong numbers; a mean over tokens, not divided by
            ``num_items_in_batch``, with weights or groups.

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
        uneven: bool = False,
        sample_weights: str | None = None,
        groups: str | None = None,
        compile: bool | str | Backend = False,
        reference_batch: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked without an optimizer."""
        filter_chain(transforms, guarded=False)
        check_columns(sample_weights, groups, microbatches, reference_batch)
        own = frozenset(vars(self))
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        check_processes(self.accelerator, self.args.dataloader_drop_last, uneven)
        self.add_callback(_Gate(self))
        self.transforms, self.microbatches = transforms, microbatches
        self.plan: Plan = plan
        self.memory_budget: int | float | None = memory_budget
        self.uneven: bool = uneven
        self.sample_weights: str | None = sample_weights
        self.groups: str | None = groups
        self.compile: bool | str | Backend = compile
        self.reference_batch: Mapping[str, Any] | None = reference_batch
        self._hosted: Hosted | None = None
        self._train_loader: Any = None
        self._inherited = frozenset(vars(self)) - own
        self._metrics = _Metrics()
        self._loss_log = LossLog("FilteredTrainer")
        check_fsdp2(self.accelerator, self.model)
        if is_fsdp2(self.accelerator):
            check_over_shards("FilteredTrainer", self._over_shards())

    def _over_shards(self) -> tuple[OverShards, ...]:
        """Return what is not possible with sharded parameters."""
        batches = self.args.gradient_accumulation_steps
        return (
            OverShards(
                batches > 1,
                f"gradient_accumulation_steps={batches}",
                "Use a larger per_device_train_batch_size and more microbatches, which with "
                "memory_budget=0 hold little in addition.",
            ),
            OverShards(self.uneven, "uneven=True", "Use dataloader_drop_last=True."),
            OverShards(
                self._names_columns,
                f"the columns {self._columns} for sample_weights and groups",
                "Leave them out; labels of -100 remove tokens.",
            ),
            OverShards(
                self.reference_batch is not None,
                "reference_batch",
                'Use reference_filter("average").',
            ),
            OverShards(self.compile is not False, f"compile={self.compile!r}", "Leave it out."),
            OverShards(self.plan not in ("auto", "fused"), f"plan={self.plan!r}", 'Use "auto".'),
        )

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, when all processes have models of the same parameters.

        DistributedDataParallel, which comes next, stops the process if they differ.
        """
        named = dict(cast(nn.Module, self.model).named_parameters())
        if self.args.world_size > 1 and not any(map(is_sharded, named.values())):
            check_leaves_alike(named, self._ranks)
        return super().create_optimizer(*args, **kwargs)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one step, and the number of items per row."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._host().begin()
        counts = self._mark_last(batches)
        if items is None:
            return batches, None
        if counts is not None:
            real = [self._without_labels(batch) for batch in batches]
            items = super().get_batch_samples(iter(real), len(real), device)[1]
        # The items that Trainer counts, and so their rows, are of all ranks or of this one.
        ranks = self._ranks if self.args.average_tokens_across_devices else ALONE
        if self._names_columns:
            with _named_remedy():
                found = [self._samples(batch, counted=True) for batch in batches]
            return batches, _items_per_row(found, ranks)
        rows = sum(self._rows_in(batch) for batch in batches) * ranks.size
        if counts is not None:
            rows = max(1, sum(counts) if ranks.size > 1 else counts[self.args.process_index])
        return batches, torch.as_tensor(items) / rows

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
        self._mark_unscaled(False)
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers have two sets of parameters
        batch = self._prepare_inputs(inputs)
        hosted = self._host()
        items = num_items_in_batch
        marks: dict[str, Tensor | None] = {}
        with self.compute_loss_context_manager(), _named_remedy(), self._as_one_process():
            if self._names_columns:
                batch, marks = self._marked(batch, items)
                items = None  # of each sample, in the batch
            batch, live = self._with_rows(batch)
            hosted.shared = live if items is None else {ITEMS: torch.as_tensor(items), **live}
            if not self.accelerator.sync_gradients:
                return torch.zeros_like(hosted.accumulate(batch, **marks))
            reference = self._reference(ITEMS in batch)
            result = hosted.step(batch, reference_batch=reference, **marks)
        self._mark_unscaled(True)
        if self.args.world_size > 1 and self.args.ddp_broadcast_buffers is not False:
            copy_buffers(cast(nn.Module, self.model), self._ranks)
        result.info.pop(ROWS, None)
        mark_rows(result)
        of_rows = (result.aux or {}).keys() - result.info.keys()
        for name, value in logged(result).items():
            number = self._of_share(value) if name in of_rows else value
            self._metrics.since_log.setdefault(name, []).append(number)
        return self._of_share(result.loss)

    def _of_share(self, mean: Tensor) -> Tensor:
        """Weight a mean over rows of this process, so that the mean over processes is right."""
        share = self._metrics.share
        return torch.zeros_like(mean) if share == 0 else mean * share

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the filter and the values logged by the loss to the training logs."""
        if self._loss_log.is_open:
            for name, value in logs.items():
                self._loss_log.add(name, value)
            return
        if {"loss", "learning_rate"} <= logs.keys():  # by Trainer, and so on all ranks
            means = {
                name: torch.stack(v).mean().item() for name, v in self._metrics.since_log.items()
            }
            if self.args.world_size > 1:
                means = averaged(means, self._ranks)
            logs.update(means | logs)  # Trainer's own values take precedence
            self._metrics.since_log = {}
        super().log(logs, start_time)

    @override
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate as `Trainer` does, without the columns of weights and groups."""
        return super().prediction_step(model, self._without_columns(inputs), *args, **kwargs)

    @override
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept = cast(list[str], self._signature_columns)
        kept += [name for name in self._columns if name not in kept]

    def check_batches(self) -> None:
        """Refuse, before the first step, a batch that cannot be cut into ``microbatches``.

        Raises:
            ValueError: There is such a batch.
        """
        if self.groups is not None:
            return  # samples of any number belong to the rows
        check_division(
            "FilteredTrainer",
            self._train_sizes(),
            self.microbatches,
            self.state.max_steps * self.args.gradient_accumulation_steps,
            "per_device_train_batch_size",
            "dataloader_drop_last=True",
            self.uneven,
        )

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's loader, and store it for a check when the number of steps is known."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        self._train_loader, self._metrics.last = loader, None
        if self.uneven and self.args.world_size > 1 and not self.accelerator.even_batches:
            # With complete batches all ranks have as many; the samples that complete them are
            # removed by `_mark_last`.
            shard = getattr(loader, "batch_sampler", None)
            if isinstance(shard, BatchSamplerShard):
                check_sizes_known(cast(Any, shard).batch_sampler)
                cast(Any, shard).even_batches = True
            self._metrics.last = last_sizes(loader)
        return loader

    def _train_sizes(self) -> BatchSizes | None:
        """Return the sizes of the batches of this process, if they are known."""
        if self.args.world_size > 1:
            return sizes_on_rank(self._train_loader, self.args.world_size)
        return sizes_in(self._train_loader)

    @property
    def _ranks(self) -> Ranks:
        """The processes of the trainer."""
        several = self.args.world_size > 1 or is_fsdp2(self.accelerator)
        return Ranks.of(None) if several else ALONE

    @contextmanager
    def _as_one_process(self) -> Iterator[None]:
        """Let Trainer count the items of one process, and not multiply losses by their number.

        It does so because DistributedDataParallel takes the mean over processes; here the mean is
        over the rows of all of them, of which ``num_items_in_batch`` is a share.
        """
        before = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before

    def _mark_unscaled(self, unscaled: bool) -> None:
        """Tell accelerate, which would unscale before it clips, whether gradients are unscaled."""
        if self.accelerator.scaler is not None:
            self.accelerator.native_amp = not unscaled

    def _host(self) -> Hosted:
        """Return the wrapper for the present model and optimizer."""
        model = cast(nn.Module, self.model)
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        if self._hosted is None or not self._hosted.serves(model, optimizer):
            if hasattr(optimizer, "scaler"):  # accelerate's, which would unscale and skip
                cast(Any, optimizer).scaler = None
            if is_fsdp2(self.accelerator):
                reshard(model.modules())
                refuse_sharding_options(model)
                check_copies_alike("FilteredTrainer", model, self._ranks)
            self._hosted = Hosted(
                model,
                self._microbatch_loss,
                over_all_ranks(self.transforms, self._ranks),
                optimizer,
                self.microbatches,
                plan=self.plan,
                memory_budget=self.memory_budget,
                uneven=self.uneven,
                compile=self.compile,
                scaler=self.accelerator.scaler,
                owners=self._owners(model),
                ranks=self._ranks,
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

    def _mark_last(self, batches: list[Any]) -> list[int] | None:
        """Note in the last batch of an epoch how many of its samples do not just complete it.

        Returns:
            The number of rows of this step with samples, of each process; None if all rows have.
        """
        sizes, metrics = self._metrics.last, self._metrics
        metrics.share = 1.0
        if sizes is None or not self.accelerator.gradient_state.end_of_dataloader:
            return None
        rank, size = self._place
        before = sum(self._rows_in(batch) for batch in batches[:-1])
        rows = self._rows_in(batches[-1])
        batches[-1] = {**batches[-1], LIVE: sizes[rank]}
        counts = [before + min(rows, samples) for samples in sizes]
        metrics.share = counts[rank] * size / sum(counts)
        return counts

    def _without_labels(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch without the labels of samples that only complete it."""
        if LIVE not in batch:
            return batch
        found = dict(batch)
        for name in {"labels", "shift_labels"} & batch.keys():
            found[name] = batch[name].clone()
            found[name][batch[LIVE] :] = -100
        return found

    def _with_rows(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a batch that fills all rows, and the mask of those that have samples."""
        inputs = dict(batch)
        samples = inputs.pop(LIVE, None)
        if samples is None:
            return inputs, {}
        rows = self._rows_in(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.ndim:
                inputs[name] = value[: max(rows, samples)]
        return inputs, {LIVE: samples_first(rows, samples, self.args.device)}

    def _rows_in(self, batch: dict[str, Any]) -> int:
        if self.microbatches is not None:
            return self.microbatches
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        return max((len(tensor) for tensor in tensors if tensor.ndim), default=0)

    @property
    def _columns(self) -> list[str]:
        return [name for name in (self.sample_weights, self.groups) if name is not None]

    @property
    def _names_columns(self) -> bool:
        return bool(self._columns)

    def _without_columns(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self._columns}

    def _column(self, batch: Mapping[str, Any], argument: str, name: str) -> Any:
        if name not in batch:
            raise ValueError(
                f"FilteredTrainer: expected a column {name!r} in the batch for {argument}=, found "
                f"{sorted(batch)}. Put numbers of this name into every sample of the data set (a "
                "collator omits or refuses texts), or let the data_collator add them."
            )
        return batch[name]

    def _samples(self, batch: Mapping[str, Any], counted: bool) -> _Samples:
        """Return the samples of a batch, and their weights and rows.

        Args:
            batch: The batch with its columns.
            counted: True if the loss is divided by the number of items.
        """
        inputs = self._without_columns(batch)
        real = inputs.pop(LIVE, None)
        size = samples_in(inputs)
        if self.groups is None:
            index = self._rows_of_places(size, size if real is None else real)
        else:
            index = self._rows_of_groups(self._column(batch, "groups", self.groups), size)
        device = index.device
        if self.sample_weights is None:
            weights = torch.ones(size, device=device)
        else:
            given = self._column(batch, "sample_weights", self.sample_weights)
            weights = mark_samples(inputs, given, None, None).weights
            device = weights.device
        weights = weights.to(_tree.sum_dtype(weights))
        if real is not None:
            weights = torch.where(torch.arange(size, device=device) < real, weights, 0.0)
        items = None
        if counted:
            items = self._items_of(inputs).to(weights)
            weights = torch.where(items == 0, 0.0, weights)
        else:
            self._check_mean_of_samples(inputs)
        rows = size if self.microbatches is None else self.microbatches
        return _Samples(inputs, weights, index.to(device), items, rows)

    def _rows_of_places(self, size: int, real: int) -> Tensor:
        """Return the row of each sample, of which the last ones do not count. (N,) int64."""
        rows = self.microbatches
        if real == size or rows is None:
            return rows_of_samples(size, rows, self.uneven)
        own = torch.arange(real) if real < rows else rows_of_samples(real, rows, self.uneven)
        return torch.cat([own, torch.full((size - real,), rows - 1)])

    def _rows_of_groups(self, given: Any, size: int) -> Tensor:
        """Return the row of each sample from the numbers of their groups. (N,) int64."""
        if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(
                f"FilteredTrainer: expected whole numbers in the column {self.groups!r} for "
                f"groups=, found {kind}. Number the users, tasks or domains in the data set."
            )
        if given.shape != (size,):
            raise ValueError(
                f"FilteredTrainer: expected groups= of shape ({size},) in the column "
                f"{self.groups!r}, found {tuple(given.shape)}. Give one number per sample."
            )
        index = number_groups(given)
        found = int(index.max()) + 1  # an index out of range would stop the device
        if self.microbatches is not None and found > self.microbatches:
            raise ValueError(
                f"FilteredTrainer: expected at most microbatches={self.microbatches} different "
                f"numbers in the column {self.groups!r}, found {found} in a batch. Use "
                f"microbatches={size}, the batch size: rows without samples take no part."
            )
        return index

    def _items_of(self, inputs: dict[str, Any]) -> Tensor:
        """Return the number of items of each sample, as `Trainer` counts them in a batch. (N,)."""
        count = super().get_batch_samples

        def of_sample(sample: dict[str, Tensor]) -> Tensor:
            return torch.as_tensor(count(iter([sample]), 1, sample["labels"].device)[1])

        tensors = {n: value[:, None] for n, value in inputs.items() if isinstance(value, Tensor)}
        with self._as_one_process():
            return torch.vmap(of_sample)(tensors)

    def _check_mean_of_samples(self, inputs: dict[str, Any]) -> None:
        """Refuse a mean over tokens, which is not the mean over samples of unequal lengths."""
        labels = inputs.get("labels")
        if type(self).compute_loss is not Trainer.compute_loss or not isinstance(labels, Tensor):
            return
        if labels.ndim > 1 and not labels.is_floating_point():
            raise ValueError(
                f"FilteredTrainer: expected a loss divided by {ITEMS} with {self._columns} and "
                f"several labels per sample, found a forward method that does not take {ITEMS}: "
                "its mean over the tokens of a batch is not a mean over samples. Let forward take "
                f"**kwargs and divide by {ITEMS}, or give a compute_loss_func that does."
            )

    def _marked(
        self, batch: Mapping[str, Any], items_per_row: Tensor | int | None
    ) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
        """Return a batch for the loss, and the weights and groups of its samples for the rows."""
        samples = self._samples(batch, items_per_row is not None)
        inputs = {**samples.inputs, WEIGHTS: samples.weights}
        if items_per_row is not None:
            assert samples.items is not None  # they were counted
            per_row = torch.as_tensor(items_per_row).to(samples.weights).expand(samples.rows)
            if self.groups is not None:
                per_row = samples.sums(samples.weights * samples.items)
            inputs[ITEMS] = samples.share_of_items(per_row)
        groups = None if self.microbatches is None else samples.index
        return inputs, {"sample_weights": samples.weights, "groups": groups}

    def _reference(self, counted: bool) -> dict[str, Any] | None:
        """Return the reference batch for the loss.

        Args:
            counted: True if the number of items is in the batch, and not shared by all rows.
        """
        if self.reference_batch is None:
            return None
        inputs = self._prepare_inputs(self._without_columns(self.reference_batch))
        if counted:
            items = self._items_of(inputs)
            inputs[ITEMS] = items.sum().to(torch.get_default_dtype()).expand(len(items))
        return inputs

    def _microbatch_loss(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        model = cast(nn.Module, self.model)
        inputs = dict(inputs)
        weights, items = inputs.pop(WEIGHTS, None), inputs.pop(ITEMS, None)
        # Samples run one by one, and those of a reference batch have one number.
        items = self._host().shared.get(ITEMS) if items is None else items[0]
        with self._loss_log.opened() as logged:
            # A pair with the outputs only if those are requested.
            loss = self.compute_loss(model, inputs, num_items_in_batch=items)
        log_weights(logged, weights)
        return cast(Tensor, loss), logged

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder, state = Path(output_dir), self._host().state_dict()
        if self.args.should_save:
            torch.save(state, folder / STATE_FILE)
            for old in folder.glob(RANK_FILE.format("*", "*")):
                old.unlink()
        if self._states_differ(state):
            folder.mkdir(parents=True, exist_ok=True)  # the first rank may be on another machine
            torch.save(state, folder / RANK_FILE.format(*self._place))

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint, STATE_FILE)
        if of_ranks := sorted(Path(checkpoint).glob(RANK_FILE.format("*", "*"))):
            file = Path(checkpoint, RANK_FILE.format(*self._place))
            if file not in of_ranks:
                raise ValueError(
                    f"FilteredTrainer: expected {file.name} in {checkpoint}, found "
                    f"{of_ranks[0].name}: transforms before across_ranks() have a state of their "
                    "own on every rank. Resume with as many processes as the checkpoint has files."
                )
        found = file.is_file()
        saved = torch.load(file, map_location="cpu", weights_only=True) if found else None
        self._host().resume(saved, str(file))

    @property
    def _place(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes."""
        return self.args.process_index, self.args.world_size

    def _states_differ(self, state: Mapping[str, Any]) -> bool:
        """Return, alike on all ranks, whether their transforms have other states.

        The states of transforms behind `across_ranks` are equal.
        """
        if self.args.world_size == 1 or not state:
            return False
        if self._host().transforms.parts[0].name == "across_ranks":
            return False
        return differ(state, self._ranks)


def _items_per_row(batches: list[_Samples], ranks: Ranks) -> Tensor:
    """Return the weighted number of items of a step, per row of the ranks that takes part. ()."""
    items = [samples.weights * cast(Tensor, samples.items) for samples in batches]
    total = torch.stack([values.sum() for values in items]).sum()
    live = torch.stack([(samples.sums(samples.weights) > 0).sum() for samples in batches]).sum()
    total, live = ranks.total(torch.stack([total, live.to(total)])).unbind()
    return total / live.clamp(min=1)


@contextmanager
def _named_remedy() -> Iterator[None]:
    """Name Trainer's options in the error for a batch that cannot be cut."""
    try:
        yield
    except ValueError as error:
        if "divisible by the number of microbatches" in str(error):
            error.add_note(
                "Of a Trainer: TrainingArguments(dataloader_drop_last=True), or "
                "FilteredTrainer(uneven=True)."
            )
        elif "at least one sample per row" in str(error):
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
        self._trainer._mark_unscaled(False)
        if not self._trainer._host().kept:
            self._trainer.accelerator.sync_gradients = False

    @override
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.accelerator.sync_gradients = True
