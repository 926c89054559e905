"""Every metric as a function of a batch of images, labels and sample ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from gradfilter import diagnostics
from gradfilter.lab.stats import _outputs
from gradfilter.lab.stats._catalogue import MetricName
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._draws import seeds
from gradfilter.lab.stats._jitter import jittered
from gradfilter.lab.stats._on_batches import agreement, sharpness
from gradfilter.lab.stats._recorder import Measure, Values
from gradfilter.lab.stats._tangent import difference_quotient
from gradfilter.lab.train._restore import Restored


def measure_of(config: StatsConfig, restored: Restored) -> Measure:
    """The metric that is asked for, at a checkpoint."""
    return MEASURES[config.metric](config, restored)


def _of_outputs(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[StatsConfig, Restored], Measure]:
    def make(config: StatsConfig, restored: Restored) -> Measure:
        return lambda images, labels, ids: Values(
            function(_outputs.logits_of(restored.model, images), labels)
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
        logits = _outputs.logits_of(restored.model, images)
        return _outputs.normalised(logits, labels, config.normalization, config.target_logit_only)

    return _tangent(config, restored, outputs)


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

    return _tangent(config, restored, jacobian)


def _tangent(
    config: StatsConfig, restored: Restored, function: Callable[[Tensor, Tensor], Tensor]
) -> Measure:
    mean, std = restored.data.mean, restored.data.std

    def measure(images: Tensor, labels: Tensor, ids: Tensor) -> Values:
        copies = jittered(images, ids, mean, std, config.mc_sample_seed)
        return Values(
            difference_quotient(lambda x: function(x, labels), images, copies, config.legacy_scale)
        )

    return measure


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
            iterations=1,  # the top eigenvalue comes with it
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
            probes=2,  # the trace comes with it
            iterations=config.num_power_iters,
            seed=seeds(config.mc_sample_seed, "start", ids),
        )
        return Values(found.tops, found.residuals)

    return measure


def _chunk_size(config: StatsConfig, restored: Restored) -> int | None:
    return restored.data.classes if config.bigmem else None


MEASURES: Mapping[MetricName, Callable[[StatsConfig, Restored], Measure]] = {
    "crossentropy": _of_outputs(_outputs.crossentropy),
    "accuracy": _of_outputs(_outputs.accuracy),
    "confidence": _of_outputs(_outputs.confidence),
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
