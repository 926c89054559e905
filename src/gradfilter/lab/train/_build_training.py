"""Build a training from a configuration: model, data, chain and initial state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

import gradfilter as gf
from gradfilter.distributed import across_ranks
from gradfilter.distributed._ranks import ALONE, Ranks
from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.data._batches import Order, augmentation, class_balanced, shuffled, steps_until
from gradfilter.lab.data._load import load_data
from gradfilter.lab.data._samples import Data
from gradfilter.lab.models._build import build_model
from gradfilter.lab.train._torch_optimizers import (
    TORCH,
    as_usage_error,
    torch_arguments,
    torch_class,
)
from gradfilter.lab.train._train_config import TrainConfig
from gradfilter.lab.train._training import Training, no_totals

# --- The chain that a configuration describes ---


def update_of(
    config: TrainConfig,
    total_steps: int,
    steps_per_epoch: float,
    ranks: Ranks = ALONE,
    lr: gf.Schedule | None = None,
    matrices: Collection[str] = (),
) -> gf.Transform:
    """Build the chain in the order: rows, one gradient, sharpness, clipping, update rule.

    Args:
        config: Checked settings.
        total_steps: Length of the training, for schedules.
        steps_per_epoch: Converts settings in epochs to steps.
        ranks: The processes whose rows are reduced.
        lr: Schedule of the learning rate, in place of that of the settings.
        matrices: Names of the parameters with two dims, for muon.
    """
    lr = schedule_of(config, total_steps, steps_per_epoch) if lr is None else lr
    reducer = reducer_of(config)
    # They compare the rows of all processes.
    reducer = gf.chain(*_of_all_rows(config), reducer)
    transforms = [reducer if ranks.size == 1 else gf.chain(across_ranks(), reducer)]
    transforms[:0] = _of_each_row(config)
    if config.sam is not None:
        sharp = _perturbation(config, lr)
        # A perturbation per row comes before the rows are reduced to one gradient.
        transforms.insert(len(transforms) - 1 if config.m_sharpness else len(transforms), sharp)
    if config.gsam is not None:
        transforms.append(gf.gsam_decompose(config.gsam))
    if config.agc:
        transforms.append(
            gf.agc_clip(config.agc, eps=config.agc_eps, exclude=_matches(config.agc_exclude))
        )
    if config.spike_skip is not None:
        transforms.append(gf.spike_skip(sigmas=config.spike_skip))
    if config.spike_clip is not None:
        transforms.append(gf.spike_clip(config.spike_clip))
    if config.adagc is not None:
        transforms.append(
            gf.spike_clip(
                factor=config.adagc, decay=0.98, warmup=100, per_leaf=True, warmup_norm=1.0
            )
        )
    transforms.append(_rule(config, lr, matrices))
    if config.ema is not None:
        transforms.append(gf.ema_params(config.ema))
    return gf.chain(*transforms)


def _of_each_row(config: TrainConfig) -> list[gf.Transform]:
    """Return the transforms that change each row by itself."""
    found = []
    if config.clip_per_row is not None:
        found.append(gf.clip_per_row(config.clip_per_row, per_leaf=config.clip_per_leaf))
    if config.normalize_rows is not None:
        found.append(gf.normalize_rows(config.normalize_rows))
    return found


def _of_all_rows(config: TrainConfig) -> list[gf.Transform]:
    """Return the transforms of rows that look at all of them."""
    found = []
    if config.trim_losses:
        found.append(gf.trim_losses(config.trim_losses))
    if config.outlier_filter is not None:
        found.append(gf.outlier_filter(config.outlier_filter))
    if config.clip_quantile is not None:
        limit = gf.quantile(config.clip_quantile)
        found.append(gf.clip_per_row(limit, per_leaf=config.clip_per_leaf))
    if config.clip_smallest:
        found.append(gf.clip_per_row("smallest", per_leaf=config.clip_per_leaf))
    if config.budget_clip is not None:
        found.append(gf.budget_clip(config.budget_clip, power=config.budget_power))
    return found


def reducer_of(config: TrainConfig) -> gf.Transform:
    """Return the transform that reduces the rows to one gradient, and what measures them."""
    reducer = _reducer_of(config)
    return reducer if config.watch is None else gf.chain(reducer, gf.watch(config.watch))


def _reducer_of(config: TrainConfig) -> gf.Transform:
    if config.reference is not None:
        return gf.reference_filter("given" if config.reference == "clean" else config.reference)
    if config.agree is not None:
        return gf.agree_filter(
            config.agree,
            against=config.against,
            average=config.average,
            per=config.agree_per,
            exclude=_matches(config.agree_exclude) if config.agree_exclude else None,
        )
    if config.consensus is not None:
        return gf.consensus_filter(config.consensus, soft=not config.consensus_hard)
    if config.trimmed_mean is not None:
        return gf.trimmed_mean(config.trimmed_mean)
    if config.coordinate_median:
        return gf.coordinate_median()
    if config.geometric_median:
        return gf.geometric_median()
    if config.centered_clip is not None:
        return gf.centered_clip(config.centered_clip)
    return gf.mean_rows()


def _matches(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a predicate on names: whether one of the patterns fits."""
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def schedule_of(config: TrainConfig, total_steps: int, steps_per_epoch: float) -> gf.Schedule:
    """Return the learning rate as a function of the number of applied steps.

    Args:
        config: Checked settings.
        total_steps: The step at which linear and cosine end.
        steps_per_epoch: Converts settings in epochs to steps.
    """
    lr = config.learning_rate
    warmup = round(config.lr_warmup_epochs * steps_per_epoch)
    initial = config.lr_warmup_initial
    match config.schedule:
        case "constant":
            return gf.schedules.constant(lr, warmup_steps=warmup, init_value=initial)
        case "step":
            return gf.schedules.step(
                lr,
                max(1, round(config.lr_step * steps_per_epoch)),
                config.lr_decay_rate,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )
        case "linear" | "cosine":
            curve = gf.schedules.linear if config.schedule == "linear" else gf.schedules.cosine
            return curve(
                lr, total_steps, min_value=config.lr_min, warmup_steps=warmup, init_value=initial
            )
        case "poly":
            return gf.schedules.poly(
                lr,
                config.lr_power,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )
        case "plateau":
            return gf.schedules.plateau(
                lr,
                factor=config.lr_decay_rate,
                patience=config.lr_patience,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )


def _perturbation(config: TrainConfig, lr: gf.Schedule) -> gf.Transform:
    assert config.sam is not None
    factory: Callable[..., gf.Transform] = gf.sam_perturb
    options: dict[str, Any] = {"per_microbatch": config.m_sharpness}
    if config.friendly_sam is not None:
        factory, options = gf.friendly_sam, {"sigma": config.friendly_sam}
    elif config.look_sam is not None:
        factory, options = gf.look_sam, {"k": config.look_sam}
    if config.rho_schedule == "constant":
        return factory(config.sam, adaptive=config.adaptive, **options)
    rho = gf.schedules.proportional(lr, config.rho_min, config.sam)
    return gf.scheduled(factory, rho=rho, adaptive=config.adaptive, **options)


def _rule(config: TrainConfig, lr: gf.Schedule, matrices: Collection[str]) -> gf.Transform:
    if config.optimizer.startswith(TORCH):
        try:
            return gf.from_torch(torch_class(config), lr=lr, **torch_arguments(config))
        except (TypeError, ValueError) as error:
            raise as_usage_error(config, error) from None
    if config.optimizer != "muon":
        return _wrapped(config, _plain_rule(config, lr))
    momentum = 0.95 if config.momentum is None else config.momentum
    # In the scale of AdamW, so that one learning rate fits both.
    muon = gf.muon(
        lr,
        momentum=momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = _plain_rule(replace(config, optimizer="adamw"), lr)
    branches = {"matrices": _wrapped(config, muon), "rest": _wrapped(config, rest)}
    return gf.partition(branches, lambda name: "matrices" if name in matrices else "rest")


def _plain_rule(config: TrainConfig, lr: gf.Schedule) -> gf.Transform:
    """Return the update rule alone; without momentum where the average has its role."""
    decay = config.weight_decay
    decays = _Decays(config.no_decay) if config.no_decay and decay > 0 else None
    betas = (0.0, config.betas[1]) if config.schedule_free else config.betas
    match config.optimizer:
        case "sgd":
            momentum = 0.0 if config.schedule_free else _sgd_momentum(config)
            return gf.sgd(
                lr,
                momentum=momentum,
                weight_decay=decay,
                decays=decays,
                nesterov=config.nesterov,
            )
        case "adam":
            return gf.adam(lr, betas=betas, eps=config.eps, weight_decay=decay, decays=decays)
        case "per_example_adam":
            return gf.per_example_adam(lr, betas=betas, eps=config.eps, weight_decay=decay)
        case "rmsprop":
            return gf.rmsprop(
                lr,
                alpha=config.alpha,
                eps=config.eps,
                weight_decay=decay,
                decays=decays,
                momentum=config.momentum or 0.0,
                centered=config.centered,
            )
        case "lion":
            return gf.lion(lr, betas=betas, weight_decay=decay, decays=decays)
        case _:
            return gf.adamw(lr, betas=betas, eps=config.eps, weight_decay=decay, decays=decays)


def _sgd_momentum(config: TrainConfig) -> float:
    return 0.9 if config.momentum is None else config.momentum


def _wrapped(config: TrainConfig, rule: gf.Transform) -> gf.Transform:
    if config.cautious:
        rule = gf.cautious(rule)
    if config.schedule_free:
        beta = _sgd_momentum(config) if config.optimizer == "sgd" else config.betas[0]
        return gf.schedule_free(rule, beta=beta)
    return rule if config.msam is None else gf.msam(rule, config.msam)


@dataclass(frozen=True, eq=False)
class _Decays:
    """A predicate on names: whether none of the patterns of ``--no-decay`` fits."""

    patterns: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in self.patterns)


# --- The training before its first step ---


BATCH_SIZE = 80


def build_training(
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
    lr: gf.Schedule | None = None,
) -> Training:
    """Build a training before its first step.

    Args:
        config: Settings that passed `check_values`; checks that need data or model are done here.
        device: The device to train on.
        ranks: The processes that train together.
        lr: Schedule of the learning rate, in place of that of the settings.

    Raises:
        UsageError: The data set is missing, or settings do not fit data, model or processes.
    """
    data = data_of(config, device)
    model = model_of(config, data).to(device, getattr(torch, config.dtype))
    size, order = _batching(config, data)
    rows = _rows(config, size, ranks)
    _check_rows(config, model, data, size)
    augment = None
    if config.augmentation:
        part = (ranks.rank, ranks.size)
        augment = augmentation(data, flipped_only=config.crop_flipped_only, part=part)
    per_epoch = len(data.train) / size
    total = config.steps
    if total is None:
        total = steps_until(config.epochs, len(data.train), size)
    warmup = round(config.lr_warmup_epochs * per_epoch)
    check(
        warmup <= total,
        "--lr-warmup-epochs",
        f"at most the length of the training, {total} steps",
        f"{config.lr_warmup_epochs} ({warmup} steps)",
        "The target would not be reached. Train longer, or warm up for less.",
    )
    check(
        warmup >= 1 or not config.lr_warmup_epochs,
        "--lr-warmup-epochs",
        "at least one step",
        f"{config.lr_warmup_epochs} (0 steps)",
        "Warm up for longer, or omit it.",
    )
    _check_patterns(config, model)
    loss = gf.model_loss(model, _criterion(config))
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    update = update_of(config, total, per_epoch, ranks, lr, matrices)
    eager = gf.train_step(loss, update, microbatches=rows)
    step = gf.compile(eager) if config.compile else eager
    all_rows = None
    if config.per_sample:
        all_rows = gf.per_sample_grads(loss)
    elif config.microbatches > 1:
        all_rows = gf.microbatch_grads(loss, config.microbatches)
    return Training(
        config=config,
        data=data,
        model=model,
        step=step,
        all_rows=all_rows,
        order=order,
        augment=augment,
        batch_size=size,
        total_steps=total,
        ranks=ranks,
        state=step.init(model, seed=config.seed),
        totals=no_totals(device),
        skipped=torch.zeros((), device=device, dtype=torch.int64),
        finite_until=torch.full((), -1, device=device, dtype=torch.int64),
        reference=_clean_samples(config, data) if config.reference == "clean" else None,
    )


def _clean_samples(config: TrainConfig, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and true labels of some training samples, chosen by the label seed."""
    count = config.reference_samples
    check(
        count <= len(data.train),
        "--reference-samples",
        f"at most the {len(data.train)} training samples",
        count,
        "50 is the default.",
    )
    draws = torch.Generator().manual_seed(config.label_seed)
    chosen = torch.randperm(len(data.train), generator=draws)[:count]
    return data.train.images.fetch(chosen), data.train.clean[chosen.to(data.train.clean.device)]


def data_of(config: TrainConfig, device: torch.device) -> Data:
    """Load the data set, with its wrong labels.

    Raises:
        UsageError: The data set is missing, or the options do not fit it.
    """
    return load_data(
        config.data,
        data_dir=config.data_dir,
        download=config.download,
        noise_file=config.noise_file,
        image_size=config.image_size,
        data_split_seed=config.data_split_seed,
        train_split=_size(config.train_split),
        val_split=_size(config.val_split),
        label_noise=config.label_noise,
        noise_type=config.noise_type,
        label_seed=config.label_seed,
        device=device,
        dtype=getattr(torch, config.dtype),
        resident=config.workers == 0,
    )


def _size(split: float | None) -> int | float | None:
    """Convert a split: 1 and above to a number of samples, below 1 to a fraction, 0 to None."""
    if not split:
        return None
    return int(split) if split.is_integer() else split


def model_of(config: TrainConfig, data: Data) -> nn.Module:
    """Build the model before training, on the CPU.

    Raises:
        UsageError: There is no such model, or it does not fit the images.
    """
    return build_model(
        config.model,
        classes=data.classes,
        shape=data.shape,
        additions=config.model_additions,
        init=config.weight_init,
        seed=config.seed,
        **_model_arguments(config),
    )


def _model_arguments(config: TrainConfig) -> dict[str, int]:
    found = {}
    for argument in config.model_arguments:
        name, _, number = argument.partition("=")
        check(
            name.isidentifier() and number.isdecimal(),
            "--model-arguments",
            "NAME=NUMBER",
            repr(argument),
            "depth=3 is one, for mlp and vit.",
        )
        found[name] = int(number)
    return found


def _batching(config: TrainConfig, data: Data) -> tuple[int, Order]:
    """Return the number of samples per step, and their order."""
    rows, n = config.microbatches, len(data.train)
    if config.samples_per_class is not None:
        order = class_balanced(
            data.train.labels,
            classes=data.classes,
            microbatches=rows,
            per_class=config.samples_per_class,
            seed=config.seed,
        )
        return rows * data.classes * config.samples_per_class, order
    size = BATCH_SIZE if config.batch_size is None else config.batch_size
    check(size >= 1, "--batch-size", "at least 1", size, "80 is the default.")
    check(
        size % rows == 0,
        "--batch-size",
        f"a multiple of --microbatches {rows}",
        size,
        f"{max(1, size // rows) * rows} is the nearest below.",
    )
    return size, shuffled(n, batch_size=size, seed=config.seed)


def _rows(config: TrainConfig, size: int, ranks: Ranks) -> int | None:
    """Return the number of rows per process."""
    check(
        size % ranks.size == 0,
        "torchrun",
        f"a number of processes that divides the batch of {size} samples",
        ranks.size,
        "Choose another --nproc-per-node, or another batch size.",
    )
    if config.per_sample:
        return None
    rows = config.microbatches
    check(
        rows == 1 or rows % ranks.size == 0,
        "torchrun",
        f"a number of processes that divides --microbatches {rows}",
        ranks.size,
        "Choose another --nproc-per-node, or other microbatches.",
    )
    return max(1, rows // ranks.size)


def _check_rows(config: TrainConfig, model: nn.Module, data: Data, size: int) -> None:
    """Refuse rows that are too small for BatchNorm, before anything is written."""
    samples = 1 if config.per_sample else size // config.microbatches
    first = data.train.images.fetch(torch.arange(samples) % len(data.train))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(model, buffers, (first,))
    except ValueError as error:
        raise UsageError(
            f"--model {config.model}: cannot be trained on rows of {samples} samples: {error}. "
            "Take larger microbatches, or a model without BatchNorm."
        ) from None


def _check_patterns(config: TrainConfig, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for option, patterns in (
        ("--agc-exclude", config.agc_exclude),
        ("--agree-exclude", config.agree_exclude),
        ("--no-decay", config.no_decay),
    ):
        for pattern in patterns:
            check(
                any(fnmatchcase(name, pattern) for name in names),
                option,
                "patterns of names of parameters",
                repr(pattern),
                f"It fits none of {', '.join(names[:3])}, ..., {names[-1]}.",
            )
    check(
        not all(map(_matches(config.agree_exclude), names)),
        "--agree-exclude",
        "patterns that leave a parameter to compare",
        " ".join(config.agree_exclude),
        "Omit --agree to compare none.",
    )


def _criterion(config: TrainConfig) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
