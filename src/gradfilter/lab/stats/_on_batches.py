"""Metrics that a batch has as a whole: how its gradients agree, how sharp its loss is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import gradfilter as gf
from gradfilter import diagnostics
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._draws import seeds
from gradfilter.lab.stats._recorder import Measure, Values
from gradfilter.lab.train._restore import Restored


def agreement(config: StatsConfig, restored: Restored) -> Measure:
    """Mean pairwise cosine of microbatch gradients, simple noise scale, and what that is made of.

    B = batch size / M samples make a row. A last batch that is too short has fewer rows, and
    leaves out samples that fill none; with fewer than two rows there are no numbers.
    """
    loss, (params, buffers) = (
        gf.model_loss(restored.model, F.cross_entropy),
        gf.extract(restored.model),
    )
    size = config.batch_size // config.microbatches

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        count = len(images) // size
        if count < 2:
            return Values(images.new_full((1, 4), torch.nan))
        batch = images[: count * size], labels[: count * size]
        rows = gf.microbatch_grads(loss, count)(params, batch, buffers=buffers)
        noise = diagnostics.noise_scale(rows, size)
        cosine = diagnostics.agreement(rows)
        return Values(torch.stack([cosine, noise.samples, noise.trace, noise.sq_norm])[None])

    return measure


def sharpness(config: StatsConfig, restored: Restored) -> Measure:
    """f(w + e) − f(w), and the top eigenvalue and the trace of the Hessian in the parameters."""
    loss, (params, buffers) = (
        gf.model_loss(restored.model, F.cross_entropy),
        gf.extract(restored.model),
    )

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        batch = images, labels
        rise = diagnostics.sharpness(loss, params, batch, config.rho, buffers=buffers)
        (start,) = seeds(config.mc_sample_seed, "start", ids[:1])
        (probe,) = seeds(config.mc_sample_seed, "probes", ids[:1])
        top = diagnostics.hessian_top(
            loss,
            params,
            batch,
            buffers=buffers,
            iterations=config.num_power_iters,
            seed=start,
        )
        trace = diagnostics.hessian_trace(
            loss, params, batch, buffers=buffers, probes=config.num_probes, seed=probe
        )
        return Values(torch.stack([rise, top.value, trace.value])[None], top.residual)

    return measure
