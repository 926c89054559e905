"""Metrics as functions of a batch of images, labels and sample indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradfilter as gf
from gradfilter import diagnostics
from gradfilter._types import Params, Tree
from gradfilter.diagnostics._jacobian import Normalization
from gradfilter.lab.data._samples import Data
from gradfilter.lab.stats._recorder import Measure, Values
from gradfilter.lab.stats._stats_config import MetricName, StatsConfig
from gradfilter.lab.train._restore import Restored

# --- Random numbers per sample, independent of batch, process and order ---


Purpose = Literal["jitter", "start", "probes"]


def seeds(seed: int, purpose: Purpose, ids: Tensor) -> list[int]:
    """Return one seed per sample, for one purpose.

    Args:
        seed: Seed of the whole measurement, >= 0.
        purpose: Purpose of the random numbers; each has its own stream.
        ids: Indices of the samples. (N,)
    """
    return [
        int(_sequence(seed, purpose, sample).generate_state(1, np.uint64)[0] >> 1)
        for sample in ids.tolist()
    ]


def uniform(
    seed: int, purpose: Purpose, ids: Tensor, shape: tuple[int, ...], low: float, high: float
) -> Tensor:
    """Draw numbers U[low, high] for every sample. (N, *shape) float64, on the host."""
    draws = [
        np.random.default_rng(_sequence(seed, purpose, sample)).uniform(low, high, shape)
        for sample in ids.tolist()
    ]
    return torch.from_numpy(np.stack(draws))


def _sequence(seed: int, purpose: Purpose, sample: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, *purpose.encode(), sample])


# --- Copies of images in slightly different colours ---


COPIES = 4
LOW, HIGH = 0.99, 1.01
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image."""


def jittered(images: Tensor, ids: Tensor, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """Return four copies of every image, with changed brightness, contrast and saturation.

    In raw colours r = x · std + mean, one after the other: r ← b r; r ← c r + (1 − c) grey mean of
    the image; r ← s r + (1 − s) grey image, with b, c, s from U[0.99, 1.01]. After each step,
    colours are clamped to [0, 1], or to the image's own range if that is wider. Images without
    three channels have no saturation; their grey is the mean of the channels.

    Args:
        images: Normalised images. (N, c, h, w)
        ids: Indices of the samples, which determine the factors. (N,)
        mean: Mean of the normalisation. (c, 1, 1)
        std: Standard deviation of the normalisation. (c, 1, 1)
        seed: Seed of the factors.

    Returns:
        Normalised images. (4, N, c, h, w)
    """
    raw = images * std + mean
    bounds = raw.flatten(1).aminmax(dim=1)
    low = bounds.min.clamp(max=0)[:, None, None, None]
    high = bounds.max.clamp(min=1)[:, None, None, None]
    factors = uniform(seed, "jitter", ids, (COPIES, 3), LOW, HIGH).to(raw)  # (N, 4, 3)
    copies = []
    for j in range(COPIES):
        brightness, contrast, saturation = factors[:, j, :, None, None, None].unbind(1)
        copy = (raw * brightness).clamp(low, high)
        copy = torch.lerp(grey_image(copy).mean((1, 2, 3), keepdim=True), copy, contrast)
        copy = copy.clamp(low, high)
        if raw.shape[1] == len(LUMA):
            copy = torch.lerp(grey_image(copy), copy, saturation).clamp(low, high)
        copies.append((copy - mean) / std)
    return torch.stack(copies)


def grey_image(raw: Tensor) -> Tensor:
    """Return the brightness of every pixel. (N, c, h, w) -> (N, 1, h, w)."""
    if raw.shape[1] != len(LUMA):
        return raw.mean(1, keepdim=True)
    return (raw * raw.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


# --- The change of a function from an image to slightly recoloured copies ---


LEGACY_SCALE = 0.1


def difference_quotient(
    function: Callable[[Tensor], Tensor], images: Tensor, copies: Tensor, legacy_scale: bool
) -> Tensor:
    """Compute √(mean_j ‖(h(x₀) − h(x_j))/δ_j‖²) with δ_j = ‖x₀ − x_j‖. (N,).

    The result is NaN for an image that equals its copies, for example a black one.

    Args:
        function: h, maps images to a tensor (N, ...), sample by sample.
        images: x₀. (N, c, h, w)
        copies: x_1, x_2, ... (copies, N, c, h, w)
        legacy_scale: Use δ_j = 0.1 for every j.
    """
    base = function(images)
    squares = []
    for copy in copies:
        scale: Tensor | float = LEGACY_SCALE
        if not legacy_scale:
            scale = _norm(images - copy)
        squares.append((_norm(base - function(copy)) / scale).square())
    return torch.stack(squares).mean(0).sqrt()


def _norm(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=wide)
    return norms


# --- Outputs of a network, and their accuracy ---


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, in float32 or wider. (N, C)."""
    logits: Tensor = model(images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def crossentropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute −log p_y. (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where the largest logit is that of the label, else 0. (N,)."""
    return (logits.argmax(1) == labels).to(logits.dtype)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the distance of the probabilities from certainty, ‖p − onehot(y)‖. (N,)."""
    apart = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    norms: Tensor = torch.linalg.vector_norm(apart, dim=1)
    return norms


def normalised(
    logits: Tensor, labels: Tensor, normalization: Normalization, target_logit_only: bool
) -> Tensor:
    """Return g, the function whose derivatives the metrics take. (N, C), or (N, 1) for one output.

    Args:
        logits: Logits. (N, C)
        labels: Labels. (N,)
        normalization: Any except jacobian, which normalises derivatives and not outputs.
        target_logit_only: Return only the entry of the label.
    """
    if normalization == "crossentropy":
        return crossentropy(logits, labels)[:, None]
    if normalization == "softmax":
        logits = logits.softmax(1)
    elif normalization == "logsoftmax":
        logits = logits.log_softmax(1)
    return logits.gather(1, labels[:, None]) if target_logit_only else logits


# --- Metrics of a whole batch: agreement of its gradients, sharpness of its loss ---


@dataclass(frozen=True, eq=False)
class _CheckpointLoss:
    """The loss of a network as a pure function, and the parameters and buffers of a checkpoint."""

    loss: Callable[..., Any]
    params: Params
    buffers: Tree

    @classmethod
    def of(cls, restored: Restored) -> _CheckpointLoss:
        """Return the loss at a checkpoint."""
        return cls(gf.model_loss(restored.model, F.cross_entropy), *gf.extract(restored.model))


def agreement(config: StatsConfig, restored: Restored) -> Measure:
    """Measure mean pairwise cosine of microbatch gradients, simple noise scale, and its parts.

    B = batch size / M samples make a row. A last batch that is too short has fewer rows, and
    samples that do not fill a row are omitted. With fewer than two rows the numbers are NaN.
    """
    at = _CheckpointLoss.of(restored)
    size = config.batch_size // config.microbatches

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        count = len(images) // size
        if count < 2:
            return Values(images.new_full((1, 4), torch.nan))
        batch = images[: count * size], labels[: count * size]
        rows = gf.microbatch_grads(at.loss, count)(at.params, batch, buffers=at.buffers)
        noise = diagnostics.noise_scale(rows, size)
        cosine = diagnostics.agreement(rows)
        return Values(torch.stack([cosine, noise.samples, noise.trace, noise.sq_norm])[None])

    return measure


def sharpness(config: StatsConfig, restored: Restored) -> Measure:
    """Measure f(w + e) − f(w), and the top eigenvalue and the trace of the parameters' Hessian."""
    at = _CheckpointLoss.of(restored)

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        batch = images, labels
        rise = diagnostics.sharpness(at.loss, at.params, batch, config.rho, buffers=at.buffers)
        (start,) = seeds(config.mc_sample_seed, "start", ids[:1])
        (probe,) = seeds(config.mc_sample_seed, "probes", ids[:1])
        top = diagnostics.hessian_top(
            at.loss,
            at.params,
            batch,
            buffers=at.buffers,
            iterations=config.num_power_iters,
            seed=start,
        )
        trace = diagnostics.hessian_trace(
            at.loss, at.params, batch, buffers=at.buffers, probes=config.num_probes, seed=probe
        )
        return Values(torch.stack([rise, top.value, trace.value])[None], top.residual)

    return measure


# --- All metrics by name ---


def measure_of(config: StatsConfig, restored: Restored) -> Measure:
    """Return the configured metric, at a checkpoint."""
    return MEASURES[config.metric](config, restored)


def _metric_of_outputs(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[StatsConfig, Restored], Measure]:
    def make(config: StatsConfig, restored: Restored) -> Measure:
        return lambda images, labels, ids: Values(
            function(logits_of(restored.model, images), labels)
        )

    return make


def _jacobian(config: StatsConfig, restored: Restored) -> Measure:
    return lambda images, labels, ids: Values(
        diagnostics.jacobian_norm(
            restored.model,
            images,
            normalization=config.normalization,
            targets=labels,
            target_logit_only=config.target_logit_only,
            chunk_size=_chunk_size(config, restored),
        )
    )


def _operator_norm(config: StatsConfig, restored: Restored) -> Measure:
    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        found = diagnostics.operator_norm(
            restored.model,
            images,
            normalization=config.normalization,
            targets=labels,
            target_logit_only=config.target_logit_only,
            chunk_size=_chunk_size(config, restored),
            method=config.method,
            iterations=config.num_power_iters,
            seed=seeds(config.mc_sample_seed, "start", ids),
        )
        return Values(found.values, found.residuals)

    return measure


def _tangent_jacobian(config: StatsConfig, restored: Restored) -> Measure:
    def outputs(images: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(restored.model, images)
        return normalised(logits, labels, config.normalization, config.target_logit_only)

    return _Tangent(config, restored.data, outputs)


def _tangent_hessian(config: StatsConfig, restored: Restored) -> Measure:
    def jacobian(images: Tensor, labels: Tensor) -> Tensor:
        return diagnostics.input_jacobian(
            restored.model,
            images,
            normalization=config.normalization,
            targets=labels,
            target_logit_only=config.target_logit_only,
            chunk_size=_chunk_size(config, restored),
        )

    return _Tangent(config, restored.data, jacobian)


@dataclass(frozen=True, eq=False)
class _Tangent:
    """Measure the change of a function from an image to slightly recoloured copies.

    Attributes:
        config: Settings of the metric.
        data: The data set, for its normalisation.
        function: (images (N, c, h, w), labels (N,)) -> (N, ...), sample by sample.
    """

    config: StatsConfig
    data: Data
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        seed, legacy_scale = self.config.mc_sample_seed, self.config.legacy_scale
        copies = jittered(images, ids, self.data.mean, self.data.std, seed)
        return Values(
            difference_quotient(lambda x: self.function(x, labels), images, copies, legacy_scale)
        )


def _loss_gradient(config: StatsConfig, restored: Restored) -> Measure:
    return lambda images, labels, ids: Values(
        diagnostics.jacobian_norm(
            restored.model, images, normalization="crossentropy", targets=labels
        )
    )


def _loss_hessian_trace(config: StatsConfig, restored: Restored) -> Measure:
    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        found = diagnostics.loss_curvature(
            restored.model,
            images,
            labels,
            probes=config.num_probes,
            iterations=1,  # the top eigenvalue is computed as well
            seed=seeds(config.mc_sample_seed, "probes", ids),
        )
        return Values(found.traces)

    return measure


def _loss_hessian_top(config: StatsConfig, restored: Restored) -> Measure:
    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        found = diagnostics.loss_curvature(
            restored.model,
            images,
            labels,
            probes=2,  # the trace is computed as well
            iterations=config.num_power_iters,
            seed=seeds(config.mc_sample_seed, "start", ids),
        )
        return Values(found.tops, found.residuals)

    return measure


def _chunk_size(config: StatsConfig, restored: Restored) -> int | None:
    return restored.data.classes if config.bigmem else None


MEASURES: Mapping[MetricName, Callable[[StatsConfig, Restored], Measure]] = {
    "crossentropy": _metric_of_outputs(crossentropy),
    "accuracy": _metric_of_outputs(accuracy),
    "confidence": _metric_of_outputs(confidence),
    "jacobian": _jacobian,
    "jacobian_operator_norm": _operator_norm,
    "tangent_jacobian": _tangent_jacobian,
    "tangent_hessian": _tangent_hessian,
    "loss_gradient": _loss_gradient,
    "loss_hessian_trace": _loss_hessian_trace,
    "loss_hessian_top": _loss_hessian_top,
    "agreement": agreement,
    "sharpness": sharpness,
}
