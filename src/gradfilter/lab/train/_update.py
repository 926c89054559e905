"""The chain that a configuration asks for."""

from __future__ import annotations

from fnmatch import fnmatchcase

import gradfilter as gf
from gradfilter.lab._crew import ALONE, Crew
from gradfilter.lab.train._config import TrainConfig


def update_of(
    config: TrainConfig, total_steps: int, steps_per_epoch: float, crew: Crew = ALONE
) -> gf.Transform:
    """Links in the order: rows, one gradient, sharpness, clipping, update rule.

    Args:
        config: Checked.
        total_steps: Length of the training, for schedules.
        steps_per_epoch: For what is given in epochs.
        crew: Whose rows are reduced.
    """
    lr = schedule_of(config, total_steps, steps_per_epoch)
    reducer = reducer_of(config)
    if config.budget_clip is not None:
        # Of all processes' rows together, for the budget is one of the whole batch.
        limit = gf.budget_clip(config.budget_clip, power=config.budget_power)
        reducer = gf.chain(limit, reducer)
    links = [crew.spread(reducer)]
    if config.clip_per_row is not None:
        links.insert(0, gf.clip_per_row(config.clip_per_row))
    if config.sam is not None:
        sharp = _perturbation(config, lr)
        # A perturbation per row goes before the rows become one gradient.
        links.insert(len(links) - 1 if config.m_sharpness else len(links), sharp)
    if config.gsam is not None:
        links.append(gf.gsam_decompose(config.gsam))
    if config.agc:
        patterns = config.agc_exclude
        links.append(
            gf.agc_clip(
                config.agc,
                eps=config.agc_eps,
                exclude=lambda name: any(fnmatchcase(name, p) for p in patterns),
            )
        )
    links.append(_rule(config, lr))
    if config.ema is not None:
        links.append(gf.ema_params(config.ema))
    return gf.chain(*links)


def reducer_of(config: TrainConfig) -> gf.Transform:
    """The link that makes one gradient of the rows."""
    if config.agree is not None:
        return gf.agree_filter(config.agree, against=config.against, average=config.average)
    if config.consensus is not None:
        return gf.consensus_filter(config.consensus, soft=not config.consensus_hard)
    return gf.mean_rows()


def schedule_of(config: TrainConfig, total_steps: int, steps_per_epoch: float) -> gf.Schedule:
    """The learning rate by the number of applied steps.

    Args:
        config: Checked.
        total_steps: Where linear and cosine end.
        steps_per_epoch: For what is given in epochs.
    """
    lr = config.learning_rate
    warmup = round(config.lr_warmup_epochs * steps_per_epoch)
    initial = config.lr_warmup_initial
    match config.schedule:
        case "constant":
            return gf.constant(lr, warmup_steps=warmup, init_value=initial)
        case "step":
            return gf.step(
                lr,
                max(1, round(config.lr_step * steps_per_epoch)),
                config.lr_decay_rate,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )
        case "linear" | "cosine":
            curve = gf.linear if config.schedule == "linear" else gf.cosine
            return curve(
                lr, total_steps, min_value=config.lr_min, warmup_steps=warmup, init_value=initial
            )
        case "poly":
            return gf.poly(
                lr,
                config.lr_power,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )
        case "plateau":
            return gf.plateau(
                lr,
                factor=config.lr_decay_rate,
                patience=config.lr_patience,
                min_value=config.lr_min,
                warmup_steps=warmup,
                init_value=initial,
            )


def _perturbation(config: TrainConfig, lr: gf.Schedule) -> gf.Transform:
    assert config.sam is not None
    if config.rho_schedule == "constant":
        return gf.sam_perturb(
            config.sam, adaptive=config.adaptive, per_microbatch=config.m_sharpness
        )
    return gf.scheduled(
        gf.sam_perturb,
        rho=gf.proportional(lr, config.rho_min, config.sam),
        adaptive=config.adaptive,
        per_microbatch=config.m_sharpness,
    )


def _rule(config: TrainConfig, lr: gf.Schedule) -> gf.Transform:
    decay = config.weight_decay
    match config.optimizer:
        case "sgd":
            momentum = 0.9 if config.momentum is None else config.momentum
            return gf.sgd(lr, momentum=momentum, weight_decay=decay, nesterov=config.nesterov)
        case "adam":
            return gf.adam(lr, betas=config.betas, eps=config.eps, weight_decay=decay)
        case "adamw":
            return gf.adamw(lr, betas=config.betas, eps=config.eps, weight_decay=decay)
        case "rmsprop":
            return gf.rmsprop(
                lr,
                alpha=config.alpha,
                eps=config.eps,
                weight_decay=decay,
                momentum=config.momentum or 0.0,
                centered=config.centered,
            )
